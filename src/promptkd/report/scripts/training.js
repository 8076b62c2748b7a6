/* Every metric that training logged, one line per run, or per method of a study with the range of its seeds. */

const MOST_RANGES = 3; // more of them, one over the other, show nothing

const trainingCharts = (found, models) => {
  const modelOf = (names, position) =>
    models.find((model) => model.label === names[position]) ?? { color: 1 + (position % 16) };
  const chosen = new Map(); // legend -> the positions of the lines that were chosen in it; none means all
  for (const { id, unit, names, lines } of found) {
    const several = names.length > 1;
    const picked = chosenLines(byId(id), chosen);
    addChart(byId(id), () => {
      const traces = [];
      for (const [run, x, y, low, high] of lines) {
        if (picked.size && !picked.has(run)) continue;
        const model = modelOf(names, run);
        const shade = several ? modelColor(model) : color("--accent");
        if (low.length && (picked.size || lines.length <= MOST_RANGES)) traces.push(band(x.map((step, at) => [step, y[at], low[at], high[at]]), shade));
        traces.push({
          type: "scatter", x, y, mode: x.length > 40 ? "lines" : "lines+markers", name: several ? plotText(names[run]) : "",
          line: { color: shade, width: several ? 1.4 : 1.75, dash: several && model.color > 8 ? "dash" : "solid" },
          marker: { size: 4, color: shade },
          hovertemplate: several ? "%{y:.4~g}" : "%{y:.4~g}<extra></extra>",
        });
      }
      const ends = lines.some(([, , , low]) => low.length) ? ["least", "largest"] : [];
      return {
        height: 190, xTitle: "step", yTitle: unit, traces, x: { hoverformat: ",.0f" },
        numbers: [["run", "step", unit || "value", ...ends], ...lines.flatMap(([run, x, y, low, high]) =>
          x.map((step, at) => [names[run] ?? "", step, y[at], ...(ends.length ? [low[at], high[at]] : [])]))],
      };
    });
  }
};

/* What was chosen in the legend of a chart's stage, as a set of positions that follows the legend. */
const chosenLines = (box, known) => {
  const legend = box.closest(".stage").querySelector(".chooser");
  if (!legend) return new Set();
  if (!known.has(legend)) {
    const picked = new Set();
    known.set(legend, picked);
    legend.addEventListener("change", ({ target }) => {
      picked[target.checked ? "add" : "delete"](Number(target.value));
      redraw();
    });
  }
  return known.get(legend);
};
