// Small charts: bars of days as SVG, and meters of limits. Each states its values as text, too.

import { element } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, GAP, AXIS] = [320, 96, 2, 14];

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// `points`: {label, value, text} of each day; `label` of the whole chart is what a screen reader says.
export function bars(points, label) {
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT + AXIS}`, role: "img", "aria-label": label, class: "chart" });
  const most = Math.max(...points.map((point) => point.value), 0);
  const step = WIDTH / Math.max(points.length, 1);
  svg.append(shape("line", { x1: 0, y1: HEIGHT, x2: WIDTH, y2: HEIGHT, class: "base" }));
  points.forEach((point, index) => {
    const height = most ? Math.max(point.value ? 2 : 0, (point.value / most) * (HEIGHT - 4)) : 0;
    const bar = shape("rect", {
      x: index * step + GAP / 2, y: HEIGHT - height, width: Math.max(1, step - GAP), height, rx: 1.5, class: "day",
    });
    bar.append(shape("title", {}, `${point.label}: ${point.text}`));
    svg.append(bar);
  });
  const ends = points.length > 1 ? [points[0], points.at(-1)] : points;
  ends.forEach((point, index) => {
    const at = index ? WIDTH : 0;
    svg.append(shape("text", { x: at, y: HEIGHT + AXIS - 2, "text-anchor": index ? "end" : "start" }, point.label));
  });
  return svg;
}

// A bar of what is left of a limit.
export function meter(name, note, share) {
  const fill = element("span", { class: share > 0.2 ? "fill" : "fill low" });
  fill.style.width = `${Math.round(100 * Math.max(0, Math.min(1, share)))}%`;
  return element(
    "div", { class: "limit" },
    element("p", {}, element("span", {}, name), element("span", { class: "quiet" }, note)),
    element("div", { class: "track", "aria-hidden": "true" }, fill),
  );
}

// `figures`: the columns with numbers, which stand at the right; by default all but the first.
export function table(heads, rows, figures = heads.map((_, index) => index).slice(1)) {
  const cells = (tag, values) => values.map((value, index) => element(tag, {
    class: figures.includes(index) ? "figure" : false, scope: tag === "th" ? "col" : false,
  }, value));
  return element(
    "table", {},
    element("thead", {}, element("tr", {}, ...cells("th", heads))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells("td", row)))),
  );
}
