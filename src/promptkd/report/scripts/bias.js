/* Exposure bias over lengths or steps: per model a line, its interval as a band, gaps where it is not defined. */

const stretches = (points) => {
  const found = [[]];
  for (const point of points) {
    if (point[2] === null || point[3] === null || point[1] === null) found.push([]);
    else found.at(-1).push(point);
  }
  return found.filter((stretch) => stretch.length);
};

const band = (points, shade) => {
  const x = [], y = [];
  for (const stretch of stretches(points)) {
    const back = [...stretch].reverse();
    x.push(...stretch.map((point) => point[0]), ...back.map((point) => point[0]), null);
    y.push(...stretch.map((point) => point[3]), ...back.map((point) => point[2]), null);
  }
  return { type: "scatter", x, y, mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: shade, opacity: 0.14, hoverinfo: "skip", showlegend: false };
};

const biasCharts = (plots, models) => {
  const chosen = new Map();
  for (const { id, x, y, curves } of plots) {
    const hasChooser = byId(id).closest(".stage").querySelector(".chooser") !== null;
    const picked = chosenLines(byId(id), chosen);
    const shown = () => curves.filter((_, at) => !picked.size || picked.has(at));
    addChart(byId(id), () => ({
      height: 360, xTitle: x, yTitle: y,
      numbers: [["model", x === "optimizer step" ? "step" : "length", y.replace("(l)", ""), "low", "high"], ...curves.flatMap((curve) => curve.points.map((point) => [models[curve.model].label, ...point.slice(0, 4)]))],
      y: { zeroline: true, zerolinecolor: color("--neutral"), zerolinewidth: 1 },
      traces: [
        ...(hasChooser && !picked.size ? [] : shown()).map((curve) => band(curve.points, modelColor(models[curve.model]))),
        ...shown().map((curve) => ({
          type: "scatter", mode: curve.points.length > 40 ? "lines" : "lines+markers", name: plotText(models[curve.model].label),
          x: curve.points.map((point) => point[0]), y: curve.points.map((point) => point[1]), connectgaps: false,
          customdata: curve.points.map((point) => point[2] === null || point[3] === null ? "" : ` [${minus(point[2].toFixed(1))}, ${minus(point[3].toFixed(1))}]`),
          line: { color: modelColor(models[curve.model]), width: 2, dash: modelDash(models[curve.model]) },
          marker: { size: 5 }, hovertemplate: "%{y:.1f} %%{customdata}",
        })),
      ],
    }));
  }
};
