// The grid of samples: filtered, sorted, in pages. Text from the data is only ever
// set as text.

const PAGE_SIZE = 60;

// Spells out what would steer the text around a name, or turn it round.
function spelled(text) {
  return String(text).replace(/[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g,
    (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function made(name, properties = {}, ...children) {
  if ("textContent" in properties) {
    properties = { ...properties, textContent: spelled(properties.textContent) };
  }
  const element = document.createElement(name);
  Object.assign(element, properties);
  element.append(...children);
  return element;
}

function isolated(text, className = "") {
  return made("bdi", { textContent: text, className });
}

// A path goes from left to right whatever its folders are called.
function pathOf(id) {
  return made("bdi", { textContent: id, dir: "ltr" });
}

function percentText(value) {
  return value === null ? "" : `${Math.round(100 * value)} %`;
}

class Gallery {
  constructor(data, decisions, openReview) {
    this.data = data;
    this.samples = data.samples;
    this.decisions = decisions;
    this.openReview = openReview;
    this.page = 0;
    this.order = data.samples.id.map((_, row) => row); // The most suspicious first.
    this.form = document.getElementById("filters");
    this.grid = document.getElementById("grid");
    this.fillSelects();
    this.form.addEventListener("input", () => this.refilter());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("reset", () => setTimeout(() => this.refilter()));
    document.getElementById("previous-page").addEventListener("click", () => this.turn(-1));
    document.getElementById("next-page").addEventListener("click", () => this.turn(1));
    document.addEventListener("click", (event) => this.followPair(event));
    this.selection = new Selection(this);
    this.showDuplicates();
    this.refilter();
  }

  fillSelects() {
    for (const name of ["given", "predicted"]) {
      const present = new Set(this.samples[name]);
      this.data.classes.forEach((label, number) => {
        if (!present.has(number)) return;
        this.form.elements[name].append(made("option", { value: number, textContent: label }));
      });
    }
    for (const split of new Set(this.samples.split)) {
      this.form.elements.split.append(made("option", { value: split, textContent: split }));
    }
  }

  followPair(event) {
    const button = event.target.closest("[data-given]");
    if (button === null) return;
    this.form.reset();
    for (const name of ["given", "predicted"]) {
      const select = this.form.elements[name];
      const wanted = button.dataset[name];
      // Samples of that class may be among those left out.
      if (![...select.options].some((option) => option.value === wanted)) {
        select.append(made("option", { value: wanted, textContent: this.data.classes[wanted] }));
      }
      select.value = wanted;
    }
    setTimeout(() => {
      this.refilter();
      document.getElementById("gallery").scrollIntoView();
      (this.grid.querySelector("button") ?? this.form.elements.given).focus({ preventScroll: true });
    });
  }

  refilter() {
    this.page = 0;
    this.showAnew();
  }

  showAnew() {
    this.beforeShowing?.();
    const chosen = Object.fromEntries(new FormData(this.form));
    const find = chosen.find.toLowerCase();
    const tests = {
      all: () => true,
      wrong: (row) => this.samples.wrong[row],
      differ: (row) => this.samples.given[row] !== this.samples.predicted[row],
      rejected: (row) => this.samples.rejected[row] > 0,
      undecided: (row) => this.decisions.get(row) === undefined,
      decided: (row) => this.decisions.get(row) !== undefined,
    };
    this.rows = [];
    for (const row of this.order) {
      const matches = ["given", "predicted", "split"].every(
        (name) => chosen[name] === "" || String(this.samples[name][row]) === chosen[name],
      );
      const found = find === "" || textsOf(this.samples, row).some((text) => text.toLowerCase().includes(find));
      if (matches && found && tests[chosen.kind](row)) this.rows.push(row);
    }
    this.sort(chosen.order);
    this.show();
  }

  sort(order) {
    if (order === "suspicion") return; // The order that they have.
    const values = this.samples[order];
    if (order === "id") this.rows.sort((a, b) => (values[a] < values[b] ? -1 : 1));
    else this.rows.sort((a, b) => (values[b] ?? Infinity) - (values[a] ?? Infinity) || a - b);
  }

  turn(step) {
    this.page += step;
    this.show();
    document.getElementById("gallery").scrollIntoView();
  }

  show() {
    const pages = Math.max(Math.ceil(this.rows.length / PAGE_SIZE), 1);
    this.page = Math.min(Math.max(this.page, 0), pages - 1);
    const first = this.page * PAGE_SIZE;
    const shown = this.rows.slice(first, first + PAGE_SIZE);
    this.shown = shown;
    this.grid.replaceChildren(...shown.map((row) => made("li", {}, this.card(row), this.selection.box(row))));
    this.selection.refresh();
    const text = this.rows.length === 0 ? `No ${nounOf(this.data)} matches. Clear the filters to see more.`
      : `${(first + 1).toLocaleString("en")} to ${(first + shown.length).toLocaleString("en")} of ${this.rows.length.toLocaleString("en")} ${this.data.kind}`;
    document.getElementById("shown").textContent = text;
    document.getElementById("page-text").textContent = `Page ${this.page + 1} of ${pages}`;
    document.getElementById("previous-page").disabled = this.page === 0;
    document.getElementById("next-page").disabled = this.page >= pages - 1;
    document.getElementById("pager").hidden = pages === 1;
  }

  // Marks what has been decided, leaving the cards where they are.
  refreshMarks() {
    for (const card of document.querySelectorAll("[data-row]")) {
      this.mark(card, Number(card.dataset.row));
    }
  }

  mark(card, row) {
    const one = this.decisions.get(row);
    card.dataset.decision = one?.decision ?? "";
    card.querySelector(".decision").textContent = one === undefined ? "" : this.decisions.named(one);
  }

  card(row, note = "") {
    const { id, given, predicted, probability } = this.samples;
    const classes = this.data.classes;
    const labels = [made("span", { className: "label" }, isolated(classes[given[row]]))];
    const sure = made("small", { textContent: percentText(probability[row]) });
    if (predicted[row] >= 0 && predicted[row] !== given[row]) {
      const name = made("span", { className: "label" }, "→ ", isolated(classes[predicted[row]], "predicted"));
      labels.push(made("span", { className: "with-share" }, name, sure));
    } else {
      labels[0] = made("span", { className: "with-share" }, labels[0], sure);
    }
    const facts = trainedOn(this.samples, row) ?? `${this.samples.split[row]} split`;
    const card = made(
      "button",
      { type: "button", className: "card", title: id[row] },
      shownSample(this.data, row),
      ...labels,
      made("span", { className: "facts", textContent: note || facts }),
      made("span", { className: "name" }, pathOf(id[row])),
      isolated("", "decision"),
    );
    card.dataset.row = row;
    card.addEventListener("click", (event) => {
      if (event.shiftKey || event.ctrlKey || event.metaKey) this.selection.toggle(row, event.shiftKey);
      else this.openReview(row);
    });
    this.mark(card, row);
    return card;
  }

  showDuplicates() {
    if (this.data.pairs.length === 0) return;
    document.getElementById("duplicates").hidden = false;
    document.getElementById("duplicate-list").append(
      ...this.data.pairs.map(([one, other, similarity]) => {
        const note = `similarity ${similarity.toFixed(2)}`;
        return made("li", {}, this.card(one, note), this.card(other, note));
      }),
    );
  }
}

// Samples that are decided on in one step.
class Selection {
  constructor(gallery) {
    this.gallery = gallery;
    this.rows = new Set();
    this.last = undefined; // Where a range begins.
    this.labels = document.getElementById("many-label");
    gallery.data.classes.forEach((name, label) => {
      this.labels.append(made("option", { value: label, textContent: name }));
    });
    const on = (id, action) => document.getElementById(id).addEventListener("click", action);
    on("select-shown", () => this.change(gallery.shown, true));
    on("select-none", () => this.change([...this.rows], false));
    on("many-undo", () => this.undo());
    for (const button of document.querySelectorAll("[data-many]")) {
      button.addEventListener("click", () => this.decide(button.dataset.many));
    }
    this.labels.addEventListener("change", () => {
      if (this.labels.value !== "") this.decide(RELABEL, Number(this.labels.value));
      this.labels.value = "";
    });
  }

  box(row) {
    const box = made("input", { type: "checkbox", className: "select", checked: this.rows.has(row) });
    box.setAttribute("aria-label", `Select ${this.gallery.samples.id[row]}`);
    box.addEventListener("click", (event) => this.toggle(row, event.shiftKey));
    return box;
  }

  // With a range, all from the one before to this one become as this one.
  toggle(row, range) {
    const wanted = !this.rows.has(row);
    const { shown } = this.gallery;
    const [from, to] = [shown.indexOf(this.last), shown.indexOf(row)].sort((a, b) => a - b);
    this.change(range && from >= 0 ? shown.slice(from, to + 1) : [row], wanted);
    this.last = row;
  }

  change(rows, wanted) {
    for (const row of rows) {
      if (wanted) this.rows.add(row);
      else this.rows.delete(row);
    }
    this.refresh();
  }

  refresh(said = "") {
    this.gallery.grid.querySelectorAll("li").forEach((item, place) => {
      const chosen = this.rows.has(this.gallery.shown[place]);
      item.querySelector(".select").checked = chosen;
      item.classList.toggle("selected", chosen);
    });
    const none = this.rows.size === 0;
    for (const element of document.querySelectorAll("[data-many], #many-label, #select-none")) {
      element.disabled = none;
    }
    document.getElementById("selected-count").textContent = said
      || (none ? "Hold Shift to select a range." : `${this.rows.size.toLocaleString("en")} selected`);
  }

  decide(what, label) {
    const { decisions, samples } = this.gallery;
    let rows = [...this.rows];
    if (what === "prediction") rows = rows.filter((row) => samples.predicted[row] >= 0);
    decisions.decideAll(rows.map((row) => (
      what === "prediction" ? [row, RELABEL, samples.predicted[row]] : [row, what, label])));
    this.rows.clear();
    this.refresh(`${rows.length.toLocaleString("en")} decided.`);
  }

  undo() {
    const rows = this.gallery.decisions.undo();
    this.refresh(rows === undefined ? "Nothing to undo." : `${rows.length.toLocaleString("en")} undone.`);
  }
}

// How often a training sample was rejected; undefined for one that was held out.
function trainedOn(samples, row) {
  if (samples.seen[row] === 0) return undefined;
  return `rejected ${samples.rejected[row]} of ${samples.seen[row]}`;
}

// What a sample is called in a sentence.
function nounOf(data) {
  return data.kind.replace(/s$/, "");
}

// What a sample can be found by.
function textsOf(samples, row) {
  return samples.text === undefined ? [samples.id[row]] : [samples.id[row], samples.text[row]];
}

function shownSample(data, row) {
  if (data.kind !== "texts") return picture(data, row);
  return made("span", { className: "excerpt", textContent: data.samples.text[row], dir: "auto" });
}

function picture(data, row, size = 96) {
  const image = made("img", { alt: "", width: size, height: size });
  if (data.served) image.loading = "lazy"; // Set before the source, or it is too late.
  const source = pictureSource(data, row);
  if (source === "") image.classList.add("missing");
  else image.src = source;
  return image;
}

function pictureSource(data, row) {
  return sourceOf(data, data.samples.picture[row]);
}

// Of a picture as base64 or the number that names it.
function sourceOf(data, kept, folder = "thumbnails") {
  if (kept === "") return "";
  return data.served ? `${folder}/${kept}` : `data:image/jpeg;base64,${kept}`;
}
