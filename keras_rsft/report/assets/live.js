// Sorts the samples anew while they are reviewed: on served pages alone.

const DECISIONS_BETWEEN = 10;

class Live {
  constructor(data, decisions, gallery, review) {
    Object.assign(this, { data, decisions, gallery, review });
    this.asked = 0; // How many were decided when it was asked last.
    this.running = false;
    this.answer = undefined; // What is not shown yet.
    this.placeOf = new Map(data.rows.map((row, place) => [row, place]));
    gallery.beforeShowing = () => this.apply();
    if (data.message) this.say(data.message);
    else if (data.expected !== null) this.say(this.left(data.expected));
    this.ask();
  }

  left(expected) {
    const count = Math.round(expected).toLocaleString("en");
    return `About ${count} of the labels that nobody has looked at are wrong, as estimated.`;
  }

  say(text) {
    for (const line of document.querySelectorAll(".live-note")) {
      line.hidden = false;
      line.textContent = text;
    }
  }

  // Asks after every ten decisions, one question at a time.
  async ask() {
    const count = this.decisions.count;
    if (!this.data.token || this.running || Math.abs(count - this.asked) < DECISIONS_BETWEEN) return;
    this.asked = count;
    this.running = true;
    document.querySelectorAll(".live-note").forEach((line) => line.append(" Sorting the rest anew …"));
    try {
      const answer = await fetch("order", {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Review-Token": this.data.token },
        body: JSON.stringify({ decided: this.decisions.labels() }),
      });
      if (!answer.ok) throw new Error(answer.status);
      this.take(await answer.json(), count);
    } catch {
      this.say("The rest was not sorted anew: the server does not answer.");
    }
    this.running = false;
    this.ask(); // For what was decided meanwhile.
  }

  take(answer, count) {
    if (answer.message) {
      this.say(answer.message);
      return;
    }
    const sorted = `Sorted anew after ${count.toLocaleString("en")} decisions.`;
    this.say(answer.expected === null ? sorted : `${this.left(answer.expected)} ${sorted}`);
    this.answer = answer.samples;
    // Cards do not move under the pointer: they wait until others are shown anyway.
    if (this.review.dialog.open) this.gallery.showAnew();
  }

  apply() {
    if (this.answer === undefined) return;
    const { row: rows, wrong, ...columns } = this.answer;
    this.answer = undefined;
    const { samples } = this.data;
    const left = rows.map((row) => this.placeOf.get(row));
    const current = this.review.dialog.open ? this.review.row : undefined;
    samples.wrong.fill(false);
    left.forEach((row, place) => {
      samples.wrong[row] = wrong[place];
      if (row === current) return; // What is read is what is decided on.
      for (const [name, values] of Object.entries(columns)) samples[name][row] = values[place];
    });
    const known = new Set(left);
    this.gallery.order = [...left, ...this.gallery.order.filter((row) => !known.has(row))];
    this.review.reorder(left);
  }
}
