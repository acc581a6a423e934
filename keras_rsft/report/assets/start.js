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

  const showProgress = () => {
    const count = decisions.count;
    document.getElementById("progress").value = count;
    document.getElementById("progress").max = data.total;
    document.getElementById("download").disabled = count === 0;
    const kept = decisions.storable ? "Kept in this browser."
      : "This browser does not keep them: download before you leave.";
    document.getElementById("progress-text").textContent =
      `${count.toLocaleString("en")} of ${data.total.toLocaleString("en")} decided. ${kept}`;
  };
  decisions.listeners.push(showProgress, () => gallery.refreshMarks(), () => review.showDecision());
  showProgress();

  document.getElementById("start-review").addEventListener("click", () => {
    const rows = gallery.rows;
    if (rows.length === 0) return;
    review.open(rows, rows.find((row) => decisions.get(row) === undefined) ?? rows[0]);
  });
  review.dialog.addEventListener("close", () => {
    const card = document.querySelector(`#grid [data-row="${review.row}"]`);
    (card ?? document.getElementById("start-review")).focus();
  });
  document.getElementById("download").addEventListener("click", () => {
    downloadText(decisions.asCsv(), "corrections.csv");
  });
}
