// What was decided about which sample: kept in the browser, undone, written as CSV.

const KEEP = "keep";
const RELABEL = "relabel";
const DROP = "drop";

class Decisions {
  constructor(data) {
    this.data = data;
    this.key = `keras-rsft-review:${data.run}`;
    this.made = new Map(); // Row -> {decision, label}; label only where relabelled.
    this.history = [];
    this.listeners = [];
    this.storable = true;
    this.load();
  }

  load() {
    let stored = {};
    try {
      stored = JSON.parse(localStorage.getItem(this.key) ?? "{}") ?? {};
    } catch {
      this.storable = false;
    }
    const rows = new Map(this.data.samples.id.map((id, row) => [id, row]));
    this.elsewhere = Object.create(null); // Decided with all samples shown, not on this page.
    for (const [id, one] of Object.entries(stored)) {
      if (!this.valid(one)) continue;
      if (rows.has(id)) this.made.set(rows.get(id), one);
      else this.elsewhere[id] = one;
    }
  }

  valid(one) {
    if (one === null || typeof one !== "object" || !Number.isInteger(one.given)) return false;
    if (one.given < 0 || one.given >= this.data.classes.length) return false;
    if (one.decision === KEEP || one.decision === DROP) return true;
    const known = Number.isInteger(one.label) && one.label >= 0;
    return one.decision === RELABEL && known && one.label < this.data.classes.length;
  }

  save() {
    const all = { __proto__: null, ...this.elsewhere };
    for (const [row, one] of this.made) all[this.data.samples.id[row]] = one;
    try {
      localStorage.setItem(this.key, JSON.stringify(all));
      this.storable = true;
    } catch {
      this.storable = false;
    }
    this.listeners.forEach((listener) => listener());
  }

  get count() {
    return this.made.size + Object.keys(this.elsewhere).length;
  }

  get(row) {
    return this.made.get(row);
  }

  decide(row, decision, label) {
    const given = this.data.samples.given[row];
    // The label that it has already is no other label.
    const same = decision === RELABEL && label === given;
    const one = decision === RELABEL && !same ? { decision, given, label }
      : { decision: same ? KEEP : decision, given };
    this.history.push([row, this.made.get(row)]);
    this.made.set(row, one);
    this.save();
    return one;
  }

  undo() {
    const last = this.history.pop();
    if (last === undefined) return undefined;
    const [row, before] = last;
    if (before === undefined) this.made.delete(row);
    else this.made.set(row, before);
    this.save();
    return row;
  }

  named(one) {
    if (one === undefined) return "none yet";
    if (one.decision === RELABEL) return `relabel as ${this.data.classes[one.label]}`;
    return one.decision;
  }

  asCsv() {
    const decided = [...this.made].map(([row, one]) => [this.data.samples.id[row], one]);
    const lines = [["id", "given_label", "decision", "new_label"]];
    for (const [id, one] of [...decided, ...Object.entries(this.elsewhere)]) {
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
