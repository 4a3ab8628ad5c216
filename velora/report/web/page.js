/* Sorting, the command behind a row, and the charts of a page of velora-report. */
"use strict";

const COLOURS = ["#1f77b4", "#d95f02", "#2ca02c", "#c42f36", "#7b58a6", "#8c564b", "#d066ac", "#616161", "#97900e", "#0f93a5"];
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];

/* Tables: a click on a head sorts by that column, a second one the other way; a row's command moves with it. */

function order(a, b) {
  const numbers = [a, b].map((cell) => parseFloat(cell.dataset.value));
  if (!numbers.some(Number.isNaN)) return numbers[0] - numbers[1];
  const empty = [a, b].map((cell) => cell.textContent === "-");
  if (empty[0] !== empty[1]) return empty[0] ? -1 : 1;
  return a.textContent.localeCompare(b.textContent, "en", { numeric: true });
}

function sortBy(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const sign = heads[column].getAttribute("aria-sort") === "ascending" ? -1 : 1;
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const rows = [...table.querySelectorAll("tr.row")];
  const details = new Map(rows.map((row) => [row, row.nextElementSibling?.matches(".detail") ? row.nextElementSibling : null]));
  rows.sort((a, b) => sign * order(a.cells[column], b.cells[column]));
  for (const row of rows) table.tBodies[0].append(...[row, details.get(row)].filter(Boolean));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => sortBy(table, column));
  });
}

for (const button of document.querySelectorAll("button.more")) {
  button.addEventListener("click", () => {
    const detail = button.closest("tr").nextElementSibling;
    detail.hidden = !detail.hidden;
    button.setAttribute("aria-expanded", String(!detail.hidden));
  });
}

/* Charts. Labels of series go into text nodes and canvases only, never into HTML. */

/* The two series of one thing (training and validation, score and bytes) have one colour; validation has no line in the legend of its own. */
function nameOf(series) {
  return series.of ?? series.label;
}

function seriesOptions(series, places) {
  const name = nameOf(series);
  if (!places.has(name)) places.set(name, places.size);
  const place = places.get(name);
  const dots = series.kind === "points";
  const colour = series.grey ? "#b0b0b0" : COLOURS[place % COLOURS.length];
  return {
    label: series.partner ? name : series.label,
    class: series.partner && dots ? "partner" : undefined,
    scale: series.axis,
    stroke: colour,
    width: dots ? 0 : 1.5,
    dash: series.axis === "y2" ? [3, 4] : DASHES[Math.floor(place / COLOURS.length) % DASHES.length],
    spanGaps: true,
    paths: dots ? () => null : undefined,
    points: { show: series.kind !== "line", size: dots ? 8 : 6, fill: colour },
    value: (_, value) => (value == null ? "" : value.toPrecision(5)),
  };
}

function together(chart) {
  return (plot, index, options) => {
    if (index === null || options.show === undefined) return;
    chart.series.forEach((series, place) => {
      const same = series.partner && nameOf(series) === nameOf(chart.series[index - 1]);
      if (same && plot.series[place + 1].show !== options.show) plot.setSeries(place + 1, { show: options.show }, false);
    });
  };
}

function writeNames(plot, chart) {
  const { ctx } = plot;
  const shown = chart.series.filter((series, index) => series.kind === "points" && plot.series[index + 1].show);
  const taken = [];
  ctx.save();
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.fillStyle = "#333";
  ctx.textAlign = "left";
  ctx.textBaseline = "alphabetic";
  for (const series of shown) {
    const whole = series.label.length > 28 ? series.label.split(",")[0] : series.label;
    const name = whole.length > 28 ? whole.slice(0, 27) + "…" : whole;
    const width = ctx.measureText(name).width;
    const at = plot.valToPos(series.x[0], "x", true);
    const right = plot.bbox.left + plot.bbox.width;
    const gap = 7 * devicePixelRatio;
    const x = at + gap + width > right ? at - gap - width : at + gap;
    let y = plot.valToPos(series.y[0], "y", true) - 4;
    while (taken.some((box) => Math.abs(box.y - y) < 12 * devicePixelRatio && box.x < x + width && x < box.x + box.width)) {
      y -= 12 * devicePixelRatio;
    }
    taken.push({ x, y, width });
    ctx.fillText(name, x, y);
  }
  ctx.restore();
}

function draw(figure, chart, logarithmic) {
  figure.querySelector(".uplot")?.remove();
  const places = new Map();
  const scales = { x: { time: false }, y: { distr: logarithmic ? 3 : 1 } };
  if (chart.named) {
    const widened = (_, low, high) => [low - (high - low || 1) * 0.08, high + (high - low || 1) * 0.12];
    scales.x.range = widened;
    if (!logarithmic) scales.y.range = widened;
  }
  const axes = [{ label: chart.x }, { label: chart.y, size: 66 }];
  if (chart.ticks) {
    const [low, high] = [chart.ticks[0], chart.ticks.at(-1)];
    const doubled = low > 0 && high / low >= 4;
    scales.x = { time: false, ...(doubled ? { distr: 3, log: 2, range: [low / 1.1, high * 1.1] } : {}) };
    Object.assign(axes[0], { splits: () => chart.ticks, filter: (_, splits) => splits, values: (_, splits) => splits.map(String) });
  }
  if (chart.y2) axes.push({ label: chart.y2, scale: "y2", side: 1, size: 66, grid: { show: false } });
  const options = {
    width: figure.clientWidth,
    height: 340,
    scales,
    axes,
    series: [{ label: chart.x }, ...chart.series.map((series) => seriesOptions(series, places))],
    hooks: { setSeries: [together(chart)], draw: chart.named ? [(plot) => writeNames(plot, chart)] : [] },
    cursor: { drag: { x: true, y: true, uni: 30 } },
  };
  const data = uPlot.join(chart.series.map((series) => [series.x, series.y]));
  return new uPlot(options, data, figure);
}

for (const figure of document.querySelectorAll("figure.chart")) {
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const box = document.createElement("input");
  box.type = "checkbox";
  const label = document.createElement("label");
  label.append(box, " logarithmic");
  figure.querySelector("figcaption").append(label);
  let plot = draw(figure, chart, false);
  box.addEventListener("change", () => { plot = draw(figure, chart, box.checked); });
  new ResizeObserver(() => {
    if (plot.width !== figure.clientWidth) plot.setSize({ width: figure.clientWidth, height: 340 });
  }).observe(figure);
}
document.documentElement.dataset.drawn = String(document.querySelectorAll("figure.chart .uplot").length);
