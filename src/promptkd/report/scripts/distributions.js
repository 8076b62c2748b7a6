/* The distribution of the scores of single answers: for every value, the share of answers at or below it. */

const MOST_STEPS = 400;

const pooled = (set, setting) => {
  const byModel = new Map();
  for (const view of set.views.filter((each) => each.setting === setting)) {
    for (const answer of view.answers) {
      const scores = byModel.get(answer.model) ?? new Map();
      for (const [metric, values] of Object.entries(answer.scores)) {
        const known = values.filter((value) => value !== null);
        scores.set(Number(metric), (scores.get(Number(metric)) ?? []).concat(known));
      }
      byModel.set(answer.model, scores);
    }
  }
  return byModel;
};

const quantile = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];

/* Steps of the empirical distribution, at most MOST_STEPS of them. */
const steps = (sorted) => {
  const count = Math.min(sorted.length, MOST_STEPS);
  const shares = Array.from({ length: count }, (_, at) => (at + 1) / count);
  return { x: [sorted[0], ...shares.map((share) => sorted[Math.ceil(share * sorted.length) - 1])], y: [0, ...shares.map((share) => 100 * share)] };
};

const distributionChart = (metric, lines, models) => {
  const figure = make("figure");
  const caption = make("figcaption");
  caption.append(make("span", "name", metric.label), make("span", "unit", metric.unit));
  const box = make("div", "chart wide");
  const medians = lines.map(({ model, sorted }) => `${models[model].label} ${written(metric, quantile(sorted, 0.5))}`);
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", `Distribution of ${metric.label}. Medians: ${medians.join(", ")}.`);
  box.dataset.name = metric.label;
  figure.append(caption, box, make("p", "small", `Medians: ${medians.join(", ")}.`));
  addChart(box, () => ({
    height: 230, xTitle: metric.unit, yTitle: "answers at or below, %", y: { range: [0, 101] },
    traces: lines.map(({ model, sorted }) => ({
      type: "scatter", mode: "lines", ...steps(sorted), name: plotText(models[model].label),
      line: { color: modelColor(models[model]), width: 1.75, shape: "hv", dash: modelDash(models[model]) },
      hovertemplate: "%{y:.0f} %",
    })),
    numbers: [["model", metric.label], ...lines.flatMap(({ model, sorted }) => [...sorted].map((value) => [models[model].label, value]))],
    x: { hoverformat: `.${metric.decimals}f` },
  }));
  return figure;
};

const distributions = (browser, models) => {
  const form = byId("distributions-form");
  if (!form) return;
  const metrics = browser.metrics.map(asMetric);
  const { data, setting } = form.elements;
  const place = byId("distributions-charts");

  const show = () => {
    [...place.querySelectorAll(".chart")].forEach(dropChart);
    const byModel = pooled(browser.sets[data.value], setting.value);
    const plots = metrics.map((metric, index) => {
      if (metric.yes !== null) return null; // for yes and no, the table shows everything
      const lines = [...byModel].filter(([, scores]) => scores.get(index)?.length)
        .map(([model, scores]) => ({ model, sorted: Float64Array.from(scores.get(index)).sort() }));
      return lines.length ? distributionChart(metric, lines, models) : null;
    });
    place.replaceChildren(...plots.filter(Boolean));
  };
  const settings = () => {
    const found = [...new Set(browser.sets[data.value].views.map((view) => view.setting))];
    fill(setting, found.map((text) => [text, text]), setting.value);
    show();
  };
  fill(data, browser.sets.map((set, index) => [index, set.data]), 0);
  data.addEventListener("change", settings);
  setting.addEventListener("change", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  settings();
};
