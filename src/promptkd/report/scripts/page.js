/* What all parts of the page share. Texts of a record enter the page through textContent, and Plotly through plotText. */

const byId = (id) => document.getElementById(id);

const make = (tag, className = "", text = "") => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
};

/* Plotly interprets some tags and entities in the texts that it draws. */
const plotText = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\s+/g, " ");

const fill = (select, labels, chosen) => {
  select.replaceChildren(...labels.map(([value, label]) => {
    const option = make("option", "", label);
    option.value = value;
    return option;
  }));
  if (labels.some(([value]) => String(value) === String(chosen))) select.value = chosen;
  select.closest(".field").hidden = labels.length < 2;
};

/* A true minus sign; zero has none. */
const minus = (text) => text.replace(/^-(?=[0.]*$)/, "").replace("-", "−");

/* [label, unit, better, decimals, value of a yes], as the page's data has metrics. */
const asMetric = ([label, unit, better, decimals, yes]) => ({ label, unit, better, decimals, yes });

const written = (metric, value, signed = false) => {
  const text = minus(value.toFixed(metric.unit === "tokens" && Number.isInteger(value) ? 0 : metric.decimals));
  return signed && value > 0 ? `+${text}` : text;
};

const scoreText = (metric, value) => {
  if (metric.yes !== null && (value === 0 || value === metric.yes)) return `${metric.label}: ${value ? "yes" : "no"}`;
  const unit = metric.unit === "%" || metric.unit === "tokens" ? ` ${metric.unit}` : "";
  return `${metric.label} ${written(metric, value)}${unit}`;
};
