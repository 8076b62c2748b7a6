/* KL by position in the response: per pair of distributions a line, its interval as a band. */

const promptCharts = (plots) => {
  for (const { id, curves } of plots) {
    addChart(byId(id), () => ({
      height: 360, xTitle: "position in the response, tokens", yTitle: "nats per token",
      numbers: [["curve", "positions", "nats per token", "low", "high"], ...curves.flatMap((curve) => curve.points.map((point) => [curve.label, point[4], ...point.slice(1, 4)]))],
      x: { type: "log", tickvals: [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024], ticktext: ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024"] },
      y: { rangemode: "tozero" },
      traces: [
        ...curves.map((curve) => band(curve.points, modelColor(curve))),
        ...curves.map((curve) => ({
          type: "scatter", mode: "lines+markers", name: plotText(curve.label),
          x: curve.points.map((point) => point[0]), y: curve.points.map((point) => point[1]),
          customdata: curve.points.map((point) => point[2] === null || point[3] === null ? "" : ` [${minus(point[2].toFixed(2))}, ${minus(point[3].toFixed(2))}]`),
          line: { color: modelColor(curve), width: 2, dash: modelDash(curve) },
          marker: { size: 5 }, hovertemplate: "%{y:.3f}%{customdata}",
        })),
      ],
    }));
  }
};
