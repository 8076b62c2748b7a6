/* A figure as files: SVG in light colors on white, and its numbers as CSV. Both are made here; nothing is asked for. */

const PAPER = { width: 720, height: 400 };

const save = (name, type, text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

/* In the page's light palette, whatever it is shown in. */
const asSvg = async (box) => {
  const lit = !document.documentElement.classList.contains("printing");
  document.documentElement.classList.add("printing");
  const chart = charts.get(box)();
  const drawing = { ...layout(chart), ...PAPER, paper_bgcolor: "#ffffff", margin: { l: 60, r: 20, t: 20, b: 50 } };
  drawing.showlegend = chart.traces.filter((trace) => trace.name).length > 1;
  if (lit) document.documentElement.classList.remove("printing");
  return Plotly.toImage({ data: chart.traces, layout: drawing }, { format: "svg", imageDataOnly: true, ...PAPER });
};

/* No cell begins like a formula of a spreadsheet. */
const cell = (value) => {
  const text = String(value ?? "");
  const plain = typeof value !== "number" && /^[=+\-@＝＋－＠\t]/.test(text) ? `'${text}` : text;
  return /[",\n]/.test(plain) ? `"${plain.replace(/"/g, '""')}"` : plain;
};

const asCsv = (box) => {
  const { numbers } = charts.get(box)();
  return numbers.map((line) => `${line.map(cell).join(",")}\n`).join("");
};

const fileButtons = (box) => {
  const row = make("p", "figure-files only-script");
  const name = (box.dataset.name || "figure").replace(/[^\p{L}\p{N}]+/gu, "-").toLowerCase();
  const button = (label, made) => {
    const element = make("button", "", label);
    element.type = "button";
    element.setAttribute("aria-label", `${label} of ${box.dataset.name || "this figure"}`);
    element.addEventListener("click", made);
    row.append(element);
  };
  button("SVG", async () => save(`${name}.svg`, "image/svg+xml", await asSvg(box)));
  button("CSV", () => save(`${name}.csv`, "text/csv", asCsv(box)));
  return row;
};
