/* Draws a chart when it comes near the screen, in the page's own colors. */

const darkness = window.matchMedia("(prefers-color-scheme: dark)");
const touch = window.matchMedia("(pointer: coarse)");
const charts = new Map(); // box -> a function that returns its traces, height and titles
const drawn = new Set();
const DASHES = ["solid", "dash", "dot", "dashdot"];

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const modelColor = (model) => color(`--model-${model.color > 8 ? model.color - 8 : model.color}`);
const modelDash = (model) => DASHES[(model.color + (model.color > 8 ? 1 : 0)) % DASHES.length];

const layout = ({ height, xTitle, yTitle, x = {}, y = {} }) => {
  const axis = {
    gridcolor: color("--line"), linecolor: color("--line"), zeroline: false, automargin: true,
    fixedrange: touch.matches, // dragging must scroll the page on a phone
    tickfont: { size: 11, color: color("--muted") },
  };
  const title = (text) => ({ text, font: { size: 11, color: color("--muted") }, standoff: 6 });
  return {
    margin: { l: 8, r: 8, t: 8, b: 8 }, height, showlegend: false, hovermode: "x unified",
    dragmode: touch.matches ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, color: color("--text") },
    hoverlabel: { bgcolor: color("--surface"), bordercolor: color("--line"), font: { color: color("--text"), size: 12 }, namelength: 40 },
    xaxis: { ...axis, title: title(xTitle), nticks: 6, showspikes: true, spikethickness: 1, spikecolor: color("--muted"), ...x },
    yaxis: { ...axis, title: title(yTitle), nticks: 5, exponentformat: "power", ...y },
  };
};

const draw = (box) => {
  if (!window.Plotly || !charts.has(box)) return;
  drawn.add(box);
  const chart = charts.get(box)();
  Plotly.react(box, chart.traces, layout(chart), { responsive: true, displayModeBar: false, displaylogo: false });
};
const redraw = () => drawn.forEach(draw);

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      watcher.unobserve(entry.target);
      draw(entry.target);
    }
  }
}, { rootMargin: "300px" });

const addChart = (box, chart) => {
  charts.set(box, chart);
  box.after(fileButtons(box));
  if (window.Plotly) watcher.observe(box);
};

const dropChart = (box) => {
  watcher.unobserve(box);
  charts.delete(box);
  if (drawn.delete(box)) Plotly.purge(box);
  box.nextElementSibling?.remove();
  box.remove();
};

const startCharts = () => {
  charts.forEach((_, box) => watcher.observe(box));
  darkness.addEventListener("change", redraw);
  touch.addEventListener("change", redraw);
};

let opened = [];
window.addEventListener("beforeprint", () => {
  document.documentElement.classList.add("printing"); // light colors and a width that fits paper
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((details) => { details.open = true; });
  charts.forEach((_, box) => draw(box));
  drawn.forEach((box) => Plotly.Plots.resize(box));
});
window.addEventListener("afterprint", () => {
  document.documentElement.classList.remove("printing");
  opened.forEach((details) => { details.open = false; });
  redraw();
  drawn.forEach((box) => Plotly.Plots.resize(box));
});
