// Reads values off the charts: by pointer, or by arrow keys on a focused chart.

const SVG = "http://www.w3.org/2000/svg";

function drawn(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function nearest(places, x) {
  let best = 0;
  places.forEach((place, index) => {
    if (Math.abs(place - x) < Math.abs(places[best] - x)) best = index;
  });
  return best;
}

function readableChart(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const picture = figure.querySelector("svg[role=img]");
  const marks = figure.querySelector("[data-marks]");
  const values = figure.querySelectorAll("[data-value]");
  const epoch = figure.querySelector("[data-epoch]");
  const spoken = figure.querySelector("[data-spoken]");
  let current = null;

  function clear() {
    current = null;
    marks.replaceChildren();
    values.forEach((one) => { one.textContent = ""; });
    epoch.textContent = "";
  }

  function show(index) {
    current = index;
    const x = data.x[index];
    marks.replaceChildren(
      drawn("line", { class: "rule", x1: x, x2: x, y1: data.top, y2: data.bottom }),
    );
    data.styles.forEach((style, line) => {
      const y = data.y[line][index];
      if (y !== null && y !== undefined) {
        marks.append(drawn("circle", { class: `dot ${style}`, cx: x, cy: y, r: 3.5 }));
      }
      values[line].textContent = data.texts[line][index] ?? "-";
    });
    epoch.textContent = `at epoch ${data.epochs[index]}`;
  }

  function say() {
    const parts = data.names.map((name, line) => `${name} ${data.texts[line][current] ?? "-"}`);
    spoken.textContent = `Epoch ${data.epochs[current]}: ${parts.join(", ")}`;
  }

  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const width = picture.viewBox.baseVal.width;
    show(nearest(data.x, ((event.clientX - box.left) * width) / box.width));
  });
  picture.addEventListener("pointerleave", clear);
  picture.addEventListener("blur", clear);
  picture.addEventListener("keydown", (event) => {
    const last = data.x.length - 1;
    const places = {
      ArrowLeft: Math.max((current ?? last + 1) - 1, 0),
      ArrowRight: Math.min((current ?? -1) + 1, last),
      Home: 0,
      End: last,
    };
    if (!(event.key in places)) return;
    event.preventDefault();
    show(places[event.key]);
    say();
  });
}

function copyButtons() {
  for (const button of document.querySelectorAll("[data-copy]")) {
    const source = document.getElementById(button.dataset.copy);
    button.addEventListener("click", async () => {
      const said = button.textContent;
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
      } catch {
        // Without permission for the clipboard: selected, so that Ctrl-C takes it.
        getSelection().selectAllChildren(source);
        button.textContent = "Press Ctrl-C";
      }
      setTimeout(() => { button.textContent = said; }, 2000);
    });
  }
}
