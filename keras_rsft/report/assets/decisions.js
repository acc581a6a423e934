// What was decided about which sample: kept in the browser, undone, written as CSV.

const KEEP = "keep";
const RELABEL = "relabel";
const DROP = "drop";

class Decisions {
  constructor(data) {
    this.data = data;
    this.key = `keras-rsft-review:${data.run}`;
    this.unsaved = new Map(); // Id -> decision, or undefined where it was taken back.
    this.history = [];
    this.listeners = [];
    this.storable = true;
    this.load();
    window.addEventListener("storage", (event) => {
      if (event.key === this.key || event.key === null) this.follow();
    });
  }

  // Reads what is stored, also by other tabs and of samples that this page leaves out.
  load() {
    let stored = {};
    try {
      stored = JSON.parse(localStorage.getItem(this.key) ?? "{}") ?? {};
    } catch {
      this.storable = false;
    }
    // Id -> {decision, given, label}; label only where relabelled.
    this.made = new Map(Object.entries(stored).filter(([, one]) => this.valid(one)));
    for (const [id, one] of this.unsaved) {
      if (one === undefined) this.made.delete(id);
      else this.made.set(id, one);
    }
  }

  valid(one) {
    if (one === null || typeof one !== "object" || !Number.isInteger(one.given)) return false;
    if (one.given < 0 || one.given >= this.data.classes.length) return false;
    if (one.decision === KEEP || one.decision === DROP) return true;
    const known = Number.isInteger(one.label) && one.label >= 0;
    return one.decision === RELABEL && known && one.label < this.data.classes.length;
  }

  // Changes decisions among those that are stored by now.
  save(changes) {
    for (const [id, one] of changes) this.unsaved.set(id, one);
    this.load();
    try {
      localStorage.setItem(this.key, JSON.stringify(Object.fromEntries(this.made)));
      this.storable = true;
      this.unsaved.clear();
    } catch {
      this.storable = false;
    }
    this.listeners.forEach((listener) => listener());
  }

  // Shows what another tab has decided, which is not for this one to undo.
  follow() {
    const before = this.made;
    this.load();
    const text = (made, row) => JSON.stringify(made.get(this.data.samples.id[row]));
    this.history = this.history.filter((step) => step.every(([row]) => text(before, row) === text(this.made, row)));
    this.listeners.forEach((listener) => listener());
  }

  get count() {
    return this.made.size;
  }

  get(row) {
    return this.made.get(this.data.samples.id[row]);
  }

  decide(row, decision, label) {
    return this.decideAll([[row, decision, label]])[0];
  }

  // Decides about many samples in one step, which one undo takes back.
  decideAll(choices) {
    const id = (row) => this.data.samples.id[row];
    const made = choices.map(([row, decision, label]) => {
      const given = this.data.samples.given[row];
      // The label that it has already is no other label.
      const same = decision === RELABEL && label === given;
      const one = decision === RELABEL && !same ? { decision, given, label }
        : { decision: same ? KEEP : decision, given };
      return [row, one];
    });
    this.history.push(made.map(([row]) => [row, this.get(row)]));
    this.save(made.map(([row, one]) => [id(row), one]));
    return made.map(([, one]) => one);
  }

  // Takes the last step back and returns its samples; undefined where there is none.
  undo() {
    const last = this.history.pop();
    if (last === undefined) return undefined;
    this.save(last.map(([row, before]) => [this.data.samples.id[row], before]));
    return last.map(([row]) => row);
  }

  // Of each sample decided on its label, null where it is to be dropped.
  labels() {
    const label = (one) => (one.decision === DROP ? null : one.label ?? one.given);
    return Object.fromEntries([...this.made].map(([id, one]) => [id, label(one)]));
  }

  named(one) {
    if (one === undefined) return "none yet";
    if (one.decision === RELABEL) return `relabel as ${this.data.classes[one.label]}`;
    return one.decision;
  }

  asCsv() {
    const lines = [["id", "given_label", "decision", "new_label"]];
    for (const [id, one] of this.made) {
      const label = one.decision === RELABEL ? this.data.classes[one.label] : "";
      lines.push([id, this.data.classes[one.given], one.decision, label]);
    }
    return lines.map((line) => line.map(csvCell).join(",") + "\r\n").join("");
  }
}

// A cell that no spreadsheet runs as a formula, quoted where it must be.
function csvCell(text) {
  const guarded = /^[=+\-@\t\r']/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(guarded) ? `"${guarded.replaceAll('"', '""')}"` : guarded;
}

function downloadText(text, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
