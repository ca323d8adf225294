"use strict";
/* How each variant looks, in every chart and table. */
const COLOURS = {
  // Okabe and Ito's colours, told apart by the common colour blindnesses; lightened where the page is dark.
  light: ["#0072b2", "#d55e00", "#009e73", "#b8578f", "#c98a00", "#3d94cc", "#5a5a5a"],
  dark: ["#4ba3e3", "#f0803c", "#2fc298", "#e39cc6", "#f2b233", "#9ad2f5", "#c9c9c9"],
};
const MARKS = ["circle", "square", "diamond", "triangle-up", "x", "triangle-down", "cross", "star"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const MARK_PATHS = {
  circle: "M17 8a3.5 3.5 0 1 0-7 0a3.5 3.5 0 1 0 7 0z", square: "M10.3 4.8h6.4v6.4h-6.4z", diamond: "M13.5 3.5l4.5 4.5l-4.5 4.5l-4.5-4.5z",
  "triangle-up": "M13.5 4l4 7.5h-8z", "triangle-down": "M13.5 12l4-7.5h-8z", x: "M10 6l1.5-1.5l2 2l2-2L17 6l-2 2l2 2l-1.5 1.5l-2-2l-2 2L10 10l2-2z",
  cross: "M12.3 4h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4V9.200H9.500V6.800h2.800z", star: "M13.5 3l1.400 3.300l3.600.3l-2.700 2.300l.8 3.500l-3.100-1.900l-3.100 1.900l.8-3.500l-2.700-2.300l3.600-.3z",
};
const SVG = "http://www.w3.org/2000/svg";

/** Plotly reads a little markup in labels; text from files must stay text. */
function plain(text) { return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;"); }
function css(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function palette() { return COLOURS[isDark() ? "dark" : "light"]; }

const arms = data.variants.filter((variant) => variant.role === "arm");
const providers = [...new Set(arms.map((variant) => variant.provider))];
/** A provider keeps its colour; its variants differ in dash and mark. */
function look(name) {
  const variant = arms.find((each) => each.name === name);
  if (!variant) return { colour: css("--soft"), mark: "star", dash: "dot" };
  const place = providers.indexOf(variant.provider);
  const sibling = arms.filter((each) => each.provider === variant.provider).indexOf(variant);
  const mark = MARKS[(place + 3 * sibling) % (MARKS.length - 1)];
  const dash = DASHES[(sibling + Math.floor(place / palette().length)) % DASHES.length];
  return { colour: palette()[place % palette().length], mark, dash };
}
function swatch(variant) {
  const { colour, mark, dash } = look(variant);
  const picture = document.createElementNS(SVG, "svg");
  for (const [name, value] of Object.entries({ class: "swatch", width: 27, height: 16, "aria-hidden": "true" })) picture.setAttribute(name, value);
  const line = document.createElementNS(SVG, "path");
  const strokes = { d: "M0 8H27", stroke: colour, "stroke-width": 1.6, "stroke-dasharray": { solid: "none", dot: "2 3", dash: "6 3", dashdot: "6 2 2 2", longdash: "9 3" }[dash] };
  for (const [name, value] of Object.entries(strokes)) line.setAttribute(name, value);
  const dot = document.createElementNS(SVG, "path");
  dot.setAttribute("d", MARK_PATHS[mark]);
  dot.setAttribute("fill", colour);
  picture.append(line, dot);
  return picture;
}
