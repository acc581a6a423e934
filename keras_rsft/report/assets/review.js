// One image after the other: keep, relabel or drop, by mouse or by keys alone.

const MOST_KEYS = 30;
// Digits first, then letters that mean nothing else.
const CLASS_KEYS = [..."1234567890abcefghijlmnopqrstvwxyz"];

// A class that is called by a key has that key; the others have what is left.
function keysOfClasses(classes) {
  const own = new Set(classes.map((name) => name.toLowerCase()).filter((name) => CLASS_KEYS.includes(name)));
  const left = CLASS_KEYS.filter((key) => !own.has(key));
  return classes.map((name) => {
    const key = name.toLowerCase();
    return own.delete(key) ? key : left.shift();
  });
}
const MOST_FOUND = 12;

class Review {
  constructor(data, decisions) {
    this.data = data;
    this.decisions = decisions;
    this.dialog = document.getElementById("review");
    this.rows = [];
    this.place = 0;
    this.byKeys = data.classes.length <= MOST_KEYS;
    this.keys = this.byKeys ? keysOfClasses(data.classes) : [];
    this.buttons = document.getElementById("class-buttons");
    this.input = document.getElementById("class-input");
    this.makeClassButtons();
    this.listen();
  }

  get row() {
    return this.rows[this.place];
  }

  makeClassButtons() {
    document.getElementById("find-class").hidden = this.byKeys;
    if (this.byKeys) {
      this.showClasses(this.data.classes.map((_, label) => label));
      return;
    }
    this.input.addEventListener("input", () => this.findClasses());
    this.input.addEventListener("keydown", (event) => this.onInputKey(event));
    this.findClasses();
  }

  showClasses(labels) {
    this.buttons.replaceChildren(...labels.map((label) => {
      const button = made("button", { type: "button" }, isolated(this.data.classes[label]));
      if (this.byKeys) button.prepend(made("kbd", { textContent: this.keys[label] }));
      button.dataset.label = label;
      button.addEventListener("click", () => this.decide(RELABEL, label));
      return made("li", {}, button);
    }));
    this.markClasses();
  }

  findClasses() {
    const text = this.input.value.toLowerCase();
    if (text === "") {
      this.found = [];
      this.showClasses([]);
      return;
    }
    const ranked = this.data.classes
      .map((name, label) => [name.toLowerCase().indexOf(text), label])
      .filter(([found]) => found >= 0)
      .sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    this.found = ranked.slice(0, MOST_FOUND).map(([, label]) => label);
    this.showClasses(this.found);
    const more = ranked.length - this.found.length;
    this.say(`${ranked.length} classes match${more > 0 ? `, ${MOST_FOUND} shown` : ""}.`);
  }

  onInputKey(event) {
    if (event.key === "Enter") {
      event.preventDefault();
      if (this.input.value !== "" && this.found.length > 0) this.decide(RELABEL, this.found[0]);
    } else if (event.key === "Escape") {
      event.preventDefault(); // Leaves the field, not the review.
      this.input.value = "";
      this.findClasses();
      document.getElementById("keep").focus();
    }
    event.stopPropagation();
  }

  listen() {
    const actions = {
      keep: () => this.decide(KEEP),
      drop: () => this.decide(DROP),
      "accept-prediction": () => this.acceptPrediction(),
      undo: () => this.undo(),
      back: () => this.move(-1),
      forward: () => this.move(1),
      "review-close": () => this.dialog.close(),
      "review-download": () => {
        // After the focus has gone back to the gallery.
        const download = () => document.getElementById("download").click();
        this.dialog.addEventListener("close", download, { once: true });
        this.dialog.close();
      },
    };
    for (const [id, action] of Object.entries(actions)) {
      document.getElementById(id).addEventListener("click", action);
    }
    this.dialog.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const keys = {
      k: () => this.decide(KEEP),
      d: () => this.decide(DROP),
      u: () => this.undo(),
      ArrowLeft: () => this.move(-1),
      ArrowRight: () => this.move(1),
      "/": () => !this.byKeys && this.input.focus(),
    };
    if (this.byKeys) {
      this.keys.forEach((key, label) => {
        keys[key] = () => this.decide(RELABEL, label);
      });
    }
    // On a button, Enter presses the button.
    if (!(event.target instanceof HTMLButtonElement)) keys.Enter = () => this.acceptPrediction();
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (action === undefined) return;
    event.preventDefault();
    if (!event.repeat || event.key.startsWith("Arrow")) action();
  }

  // Rows that look wrong make room for others that do so later.
  open(rows, row, wrongOnes = false) {
    this.rows = rows;
    this.wrongOnes = wrongOnes;
    this.place = Math.max(rows.indexOf(row), 0);
    this.opener = document.activeElement;
    this.dialog.showModal();
    this.dialog.focus();
    this.say("");
    this.show();
  }

  acceptPrediction() {
    const predicted = this.data.samples.predicted[this.row];
    if (predicted >= 0) this.decide(RELABEL, predicted);
  }

  decide(decision, label) {
    const one = this.decisions.decide(this.row, decision, label);
    const id = this.data.samples.id[this.row];
    if (!this.byKeys && this.input.value !== "") {
      this.input.value = "";
      this.findClasses();
      this.dialog.focus();
    }
    const isLast = this.place === this.rows.length - 1;
    if (!isLast) this.place += 1;
    this.show();
    this.say(`${id}: ${this.decisions.named(one)}.${isLast ? ` That was the last ${nounOf(this.data)}.` : ""}`);
  }

  undo() {
    const rows = this.decisions.undo();
    if (rows === undefined) {
      this.say("Nothing to undo.");
      return;
    }
    const [row] = rows;
    if (this.rows.includes(row)) this.place = this.rows.indexOf(row);
    this.show();
    const others = rows.length > 1 ? ` and ${(rows.length - 1).toLocaleString("en")} more` : "";
    this.say(`Undone: ${this.data.samples.id[row]}${others}.`);
  }

  move(step) {
    const place = this.place + step;
    if (place < 0 || place >= this.rows.length) {
      this.say(`This is the ${step > 0 ? "last" : "first"} ${nounOf(this.data)}.`);
      return;
    }
    this.place = place;
    this.show();
    this.say(`${this.title()} ${place + 1}: given ${this.text("given")}, predicted ${this.text("predicted")}.`);
  }

  text(name) {
    const label = this.data.samples[name][this.row];
    return label >= 0 ? this.data.classes[label] : "not known";
  }

  show() {
    const { id, split, probability, clean } = this.data.samples;
    const row = this.row;
    const set = (name, text) => { document.getElementById(`review-${name}`).textContent = spelled(text); };
    this.showSample(row);
    set("id", id[row]);
    set("given", this.text("given"));
    set("predicted", this.text("predicted"));
    const sure = percentText(probability[row]);
    document.getElementById("review-predicted").title = sure;
    set("predicted", sure ? `${this.text("predicted")}, ${sure}` : this.text("predicted"));
    set("split", split[row]);
    const rejected = trainedOn(this.data.samples, row);
    document.getElementById("review-rejected-row").hidden = rejected === undefined;
    set("rejected", (rejected ?? "").replace("rejected ", "") + " times");
    document.getElementById("review-clean-row").hidden = clean[row] < 0;
    set("clean", this.text("clean"));
    document.getElementById("accept-prediction").disabled = this.data.samples.predicted[row] < 0;
    this.showExamples(row);
    this.showDecision();
  }

  // Samples whose labels nobody doubts, of the given and of the proposed class.
  showExamples(row) {
    const { given, predicted, id } = this.data.samples;
    const groups = [["Given", given[row], ""], ["Proposed", predicted[row], "predicted"]]
      .filter(([, label], place) => label >= 0 && (place === 0 || label !== given[row]))
      .map(([title, label, kind]) => {
        const found = (this.data.examples[label] ?? []).filter(([name]) => name !== id[row]);
        const shown = found.map(([name, content]) => this.example(name, content));
        const heading = made("figcaption", {}, `${title}: `, isolated(this.data.classes[label], kind));
        return made("figure", {}, heading, made("div", {}, ...shown));
      });
    document.getElementById("examples").replaceChildren(...groups);
  }

  example(name, content) {
    if (this.data.kind === "texts") {
      return made("span", { className: "excerpt", textContent: content, dir: "auto" });
    }
    return made("img", { alt: `Image ${name}`, title: name, width: 88, height: 88, src: sourceOf(this.data, content) });
  }

  // Puts what is left in another order, the current sample staying where it is.
  reorder(rows) {
    if (!this.dialog.open || this.row === undefined) return;
    const seen = this.rows.slice(0, this.place + 1);
    const mine = new Set(this.rows);
    const fits = this.wrongOnes ? (row) => this.data.samples.wrong[row] : (row) => mine.has(row);
    const known = new Set(seen);
    const rest = rows.filter((row) => !known.has(row) && fits(row));
    // What was decided is not sorted, and can be gone back to.
    const decided = this.rows.filter((row) => this.decisions.get(row) !== undefined);
    const placed = new Set([...seen, ...rest]);
    this.rows = [...seen, ...rest, ...decided.filter((row) => !placed.has(row))];
    this.showDecision();
  }

  showDecision() {
    if (this.row === undefined) return;
    const place = `${(this.place + 1).toLocaleString("en")} of ${this.rows.length.toLocaleString("en")}`;
    const left = this.rows.filter((row) => this.decisions.get(row) === undefined).length;
    document.getElementById("review-place").textContent =
      `${place}, ${left.toLocaleString("en")} left, ${this.decisions.count.toLocaleString("en")} decided`;
    document.getElementById("review-download").disabled = this.decisions.count === 0;
    document.getElementById("review-decision").textContent =
      this.decisions.named(this.decisions.get(this.row));
    this.markClasses();
  }

  title() {
    const noun = nounOf(this.data);
    return noun[0].toUpperCase() + noun.slice(1);
  }

  showSample(row) {
    const image = document.getElementById("review-picture");
    const text = document.getElementById("review-text");
    const isText = this.data.kind === "texts";
    image.hidden = isText;
    text.hidden = !isText;
    if (isText) {
      text.textContent = this.data.samples.text[row] || "This text could not be read.";
      text.scrollTop = 0;
      return;
    }
    const source = pictureSource(this.data, row);
    image.classList.toggle("missing", source === "");
    if (source === "") image.removeAttribute("src");
    else image.src = source;
    image.alt = `Image ${this.data.samples.id[row]}`;
    if (this.data.served) this.showPhoto(row);
  }

  // Puts the photo itself in the place of its thumbnail, once it is there.
  showPhoto(row) {
    const load = (place) => {
      const kept = this.data.samples.picture[place] ?? "";
      const photo = new Image();
      if (kept !== "") photo.src = sourceOf(this.data, kept, "photos");
      return photo;
    };
    const photo = load(row);
    const show = () => {
      if (this.row === row) document.getElementById("review-picture").src = photo.src;
    };
    if (photo.complete && photo.naturalWidth > 0) show();
    else photo.addEventListener("load", show);
    if (this.place + 1 < this.rows.length) load(this.rows[this.place + 1]);
  }

  markClasses() {
    if (this.row === undefined) return;
    const one = this.decisions.get(this.row);
    for (const button of this.buttons.querySelectorAll("button")) {
      const label = Number(button.dataset.label);
      button.classList.toggle("given", label === this.data.samples.given[this.row]);
      button.classList.toggle("predicted", label === this.data.samples.predicted[this.row]);
      button.setAttribute("aria-pressed", String(one?.decision === RELABEL && one.label === label));
    }
  }

  say(text) {
    document.getElementById("said").textContent = text;
  }
}
