/* The browser of rows: search, order by gain or loss, and the answers of all models side by side. */

const PAGE = 10;
const LONG = 700;

const browseRows = (browser, models) => {
  const form = byId("rows-form");
  if (!form) return;
  const metrics = browser.metrics.map(asMetric);
  const { search, data, view, model, other, metric, order, mark, scores: every } = form.elements;
  const list = byId("rows-list"), status = byId("rows-status"), pagers = [...document.querySelectorAll(".pager")];
  let page = 0, found = [];
  const haystacks = new Map();

  const set = () => browser.sets[data.value];
  const current = () => set().views[view.value];
  const answersOf = (position) => current().answers.find((each) => each.model === Number(position));
  const scoreOf = (position, row) => answersOf(position)?.scores[metric.value]?.[row] ?? null;
  const chosenMetric = () => metrics[metric.value];

  /* How far the model is ahead of the other in this row, positive where it is better; without another, its own score. */
  const gain = (row) => {
    const ours = scoreOf(model.value, row), theirs = other.value === "" ? 0 : scoreOf(other.value, row);
    if (ours === null || theirs === null) return null;
    return (ours - theirs) * (chosenMetric()?.better === "lower" ? -1 : 1);
  };

  const haystack = () => {
    const key = `${data.value} ${view.value}`;
    if (!haystacks.has(key)) {
      const { asked, references } = set();
      haystacks.set(key, asked.map((turns, row) =>
        [...turns.map(([, text]) => text), ...references[row], ...current().answers.map((each) => each.text[row] ?? "")].join("\n").toLowerCase()));
    }
    return haystacks.get(key);
  };

  const select = () => {
    const wanted = search.value.trim().toLowerCase();
    const answered = (row) => current().answers.some((each) => each.text[row] !== null);
    found = set().row.map((_, row) => row).filter((row) => answered(row) && (!wanted || haystack()[row].includes(wanted)));
    if (order.value !== "data") {
      const sign = order.value === "gain" ? -1 : 1;
      const gains = new Map(found.map((row) => [row, gain(row)]));
      found.sort((a, b) => {
        const [first, second] = [gains.get(a), gains.get(b)];
        if (first === null || second === null) return (first === null) - (second === null) || a - b;
        return sign * (first - second) || a - b;
      });
    }
    page = 0;
    show();
  };

  const longText = (pre, text) => {
    if (text.length > LONG) {
      pre.classList.add("long");
      pre.tabIndex = 0; // so that a keyboard can scroll it
    }
    return pre;
  };

  const text = (content) => {
    if (!content.trim()) return make("p", "empty", "empty answer");
    const pre = make("pre", "", content);
    pre.dir = "auto";
    return longText(pre, content);
  };

  const markedText = (pieces) => {
    const pre = make("pre");
    pre.dir = "auto";
    let marked = null;
    for (const [piece, lacking] of pieces) {
      if (!lacking) marked = null;
      else if (marked === null) pre.append((marked = make("mark")));
      (marked ?? pre).append(piece);
    }
    return longText(pre, pre.textContent);
  };

  const answerCard = (answer, row, marked) => {
    const card = byId("answer-template").content.firstElementChild.cloneNode(true);
    const { label, color: shade, teacher } = models[answer.model];
    card.classList.toggle("reference", teacher);
    card.querySelector(".swatch").classList.add(`m${shade}`);
    card.querySelector(".label").textContent = label;
    card.querySelector(".text").replaceWith(marked && answer.text[row].trim() ? markedText(marked) : text(answer.text[row]));
    const scores = card.querySelector(".scores");
    for (const [index, values] of Object.entries(answer.scores)) {
      if (values[row] === null) continue;
      const score = scoreText(metrics[index], values[row]);
      if (index === metric.value) card.querySelector("h4").append(" ", make("span", "chosen", score));
      else if (every.checked) scores.append(make("span", "", score), " ");
    }
    return card;
  };

  const verdictText = (row) => {
    const chosen = chosenMetric(), ahead = gain(row);
    if (other.value === "" || ahead === null) return make("span");
    const change = scoreOf(model.value, row) - scoreOf(other.value, row);
    const sense = !chosen.better || ahead === 0 ? "tied" : ahead > 0 ? "better" : "worse";
    const [ours, theirs] = [models[model.value].label, models[other.value].label];
    return make("span", `verdict ${sense}`, `${chosen.label}: ${ours} ${written(chosen, change, true)} against ${theirs}`);
  };

  const article = (row) => {
    const element = byId("request-template").content.firstElementChild.cloneNode(true);
    element.querySelector(".where").textContent = `Row ${set().row[row]}`;
    element.querySelector("h3").append(verdictText(row));
    element.querySelector(".prompt").replaceWith(
      ...set().asked[row].flatMap(([role, content]) => (role ? [make("span", "role", role), text(content)] : [text(content)])));
    const references = set().references[row];
    element.querySelector(".references-title").textContent = references.length === 1 ? "Reference" : "References";
    element.querySelector(".reference-text").replaceWith(
      ...(references.length ? references.map(text) : [make("p", "empty", "none")]));
    const front = [model.value, other.value].filter((position) => position !== "").map(Number);
    const rank = (answer) => (front.includes(answer.model) ? front.indexOf(answer.model) : front.length);
    const answers = current().answers.filter((answer) => answer.text[row] !== null).sort((a, b) => rank(a) - rank(b));
    const pair = front.map((position) => answers.find((answer) => answer.model === position)?.text[row]);
    const different = mark.checked && pair.length === 2 && pair.every((each) => each !== undefined) ? wordDifferences(...pair) : null;
    element.querySelector(".given").replaceChildren(...answers.map((answer) =>
      answerCard(answer, row, different?.[front.indexOf(answer.model)])));
    return element;
  };

  const show = () => {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const searched = search.value.trim() ? ` with “${search.value.trim()}”` : "";
    status.textContent = `${found.length} of ${set().row.length} requests${searched}, page ${page + 1} of ${pages}.`;
    list.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(article));
    for (const pager of pagers) {
      pager.hidden = pages < 2;
      pager.querySelector(".previous").disabled = page === 0;
      pager.querySelector(".next").disabled = page === pages - 1;
      pager.querySelector(".number").textContent = `${page + 1} / ${pages}`;
    }
  };

  const turn = (by) => {
    page += by;
    show();
    status.focus({ preventScroll: true });
    status.scrollIntoView({ block: "start" });
  };

  const orders = () => {
    const chosen = chosenMetric(), sole = other.value === "";
    const [first, last] = !chosen?.better ? ["highest", "lowest"] : sole ? ["best", "worst"] : ["gains", "losses"];
    fill(order, [["data", "as in the data"], ["gain", `${first} first`], ["loss", `${last} first`]], order.value || "data");
    select();
  };

  const pairs = () => {
    const labels = current().answers.map((each) => [each.model, models[each.model].label]);
    fill(model, labels, model.value === "" ? labels.at(-1)[0] : model.value);
    model.closest(".field").hidden = false;
    const others = labels.filter(([position]) => position !== Number(model.value));
    fill(other, [["", "no other"], ...others], other.dataset.set ? other.value : others[0]?.[0] ?? "");
    other.dataset.set = "yes";
    const scored = metrics.map((each, index) => [index, each.label])
      .filter(([index]) => current().answers.some((each) => index in each.scores));
    const usual = scored.find(([index]) => metrics[index].better && metrics[index].unit === "of 100") ?? scored[0];
    fill(metric, scored, metric.value === "" ? usual?.[0] : metric.value);
    orders();
  };

  const views = () => {
    fill(view, set().views.map((each, index) => [index, each.label]), view.value);
    pairs();
  };

  fill(data, browser.sets.map((each, index) => [index, each.data]), 0);
  data.addEventListener("change", views);
  view.addEventListener("change", pairs);
  model.addEventListener("change", pairs);
  [other, metric].forEach((field) => field.addEventListener("change", orders));
  order.addEventListener("change", select);
  [mark, every].forEach((field) => field.addEventListener("change", show));
  search.addEventListener("input", select);
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const pager of pagers) {
    pager.querySelector(".previous").addEventListener("click", () => turn(-1));
    pager.querySelector(".next").addEventListener("click", () => turn(1));
  }
  views();
};
