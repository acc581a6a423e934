// Brings the page to life; without it, everything but the gallery is there to read.

document.querySelectorAll("[data-chart]").forEach(readableChart);
copyButtons();

const source = document.getElementById("gallery-data");
if (source !== null) {
  const data = JSON.parse(source.textContent);
  const decisions = new Decisions(data);
  const review = new Review(data, decisions);
  const gallery = new Gallery(data, decisions, (row) => {
    // A near duplicate may be hidden by the filters.
    const rows = gallery.rows.includes(row) ? gallery.rows : [row];
    review.open(rows, row);
  });
  const live = new Live(data, decisions, gallery, review);

  const showProgress = () => {
    const count = decisions.count;
    document.getElementById("progress").value = count;
    document.getElementById("progress").max = data.total;
    document.getElementById("download").disabled = count === 0;
    const kept = decisions.storable ? "Kept in this browser."
      : "This browser does not keep them: download before you leave.";
    const wrong = data.samples.wrong.filter((one) => one).length;
    const left = data.samples.wrong.filter((one, row) => one && decisions.get(row) === undefined).length;
    const button = document.getElementById("review-wrong");
    if (wrong > 0 && count > 0) {
      button.textContent = left === 0 ? "Look again at the labels that looked wrong"
        : `Review the ${left.toLocaleString("en")} labels left that look wrong`;
    }
    document.getElementById("progress-text").textContent =
      `${count.toLocaleString("en")} of ${data.total.toLocaleString("en")} decided. ${kept}`;
  };
  decisions.listeners.push(showProgress, () => gallery.refreshMarks(), () => review.showDecision(), () => live.ask());
  showProgress();

  document.getElementById("start-review").addEventListener("click", () => {
    const rows = gallery.rows;
    if (rows.length === 0) return;
    review.open(rows, rows.find((row) => decisions.get(row) === undefined) ?? rows[0]);
  });
  document.getElementById("review-wrong").addEventListener("click", () => {
    const found = gallery.order.filter((row) => data.samples.wrong[row]);
    const rows = found.length > 0 ? found : gallery.order;
    if (rows.length === 0) return;
    review.open(rows, rows.find((row) => decisions.get(row) === undefined) ?? rows[0], found.length > 0);
  });
  review.dialog.addEventListener("close", () => {
    const card = document.querySelector(`#grid [data-row="${review.row}"]`);
    (card ?? document.getElementById("start-review")).focus();
  });
  document.getElementById("download").addEventListener("click", () => {
    downloadText(decisions.asCsv(), "corrections.csv");
    const next = document.getElementById("next");
    next.hidden = false;
    next.focus();
    next.scrollIntoView({ block: "center" });
  });
}
