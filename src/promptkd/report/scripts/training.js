/* Every metric that training logged, one line per run. */

const trainingCharts = (found, models) => {
  const modelOf = (names, position) =>
    models.find((model) => model.label === names[position]) ?? { color: 1 + (position % 8) };
  for (const { id, unit, names, lines } of found) {
    const several = names.length > 1;
    addChart(byId(id), () => ({
      height: 190, xTitle: "step", yTitle: unit,
      traces: lines.map(([run, x, y]) => {
        const shade = several ? modelColor(modelOf(names, run)) : color("--accent");
        return {
          type: "scatter", x, y, mode: x.length > 40 ? "lines" : "lines+markers", name: several ? plotText(names[run]) : "",
          line: { color: shade, width: several ? 1.4 : 1.75 }, marker: { size: 4, color: shade },
          hovertemplate: several ? "%{y:.4~g}" : "%{y:.4~g}<extra></extra>",
        };
      }),
      x: { hoverformat: ",.0f" },
      numbers: [["run", "step", unit || "value"], ...lines.flatMap(([run, x, y]) => x.map((step, at) => [names[run] ?? "", step, y[at]]))],
    }));
  }
};
