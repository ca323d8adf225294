"use strict";
/* Data, theme and the table of rows. Text enters the page by textContent only, so no text can become markup. */
const data = JSON.parse(document.getElementById("data").textContent);
const CHUNK = 120; // rows put in the page at a time

function unpack(column) {
  if ("values" in column) return column.values;
  if ("all" in column) return new Array(data.rows.n).fill(column.all);
  return column.codes.map((code) => column.words[code]);
}
const unpacked = {};
/** Values of one field, for all rows. */
function field(key) {
  unpacked[key] ??= unpack(data.rows.columns[key]);
  return unpacked[key];
}
const allRows = Array.from({ length: data.rows.n }, (_, row) => row);

/* ---- numbers as people read them ---- */
function significant(value, digits = 3) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-4 || size >= 1e6) return value.toExponential(digits - 1).replace("e+", "e");
  const exponent = Math.floor(Math.log10(Number(size.toPrecision(digits))));
  const places = Math.max(0, digits - 1 - exponent);
  return Number(value).toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places });
}
const UNITS = {
  time: [[1e3, " s"], [1, " ms"], [1e-3, " µs"], [1e-6, " ns"]],
  bytes: [[1e12, " TB"], [1e9, " GB"], [1e6, " MB"], [1e3, " kB"], [1, " B"]],
  number: [[1e12, "T"], [1e9, "G"], [1e6, "M"]],
};
function unit(value, kind) {
  const steps = UNITS[kind];
  if (!steps || (kind === "number" && Math.abs(value) < 1e6)) return [1, ""];
  return steps.find(([size]) => Math.abs(value) >= size) ?? steps[steps.length - 1];
}
const WRITE = { count: (value) => value.toLocaleString("en-US"), ratio: (value) => significant(value) + "×", percent: (value) => significant(100 * value) + " %" };
function written(value, kind) {
  if (value === null || value === undefined) return "—";
  if (Array.isArray(value)) return value.join(", ") || "—";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (kind === "prose") return value;
  if (typeof value === "string" || kind === "text") return String(value).replaceAll("_", " ");
  if (WRITE[kind]) return WRITE[kind](value);
  const [size, name] = unit(value, kind);
  return significant(value / size) + name;
}
function range(low, high, kind, value) {
  const scale = kind === "percent" ? 0.01 : unit(value, kind)[0];
  const nearOne = kind === "ratio" && [low, high].some((bound) => bound !== 1 && significant(bound) === "1.00");
  return [low, high].map((bound) => significant(bound / scale, nearOne ? 4 : 3)).join("–");
}

/* ---- small helpers ---- */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function say(text) { document.getElementById("spoken").textContent = text; }

/* ---- theme ---- */
const root = document.documentElement;
const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
function remembered(theme) {
  try { return theme ? localStorage.setItem("moebench-theme", theme) : localStorage.getItem("moebench-theme"); } catch { return null; }
}
function isDark() { return root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches; }
function themeChanged() { window.dispatchEvent(new Event("theme")); }
if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
systemDark.addEventListener("change", themeChanged);
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  remembered(root.dataset.theme);
  themeChanged();
});

/* ---- the table ---- */
const table = document.getElementById("table");
const SAYS_SOMETHING = new Set(["variant", "tokens", "status", "latency_ms", "speedup"]);
const LEFT = new Set(["text", "prose", "list"]);
function worthShowing(column) {
  const packed = data.rows.columns[column.key];
  if (SAYS_SOMETHING.has(column.key)) return true;
  if (!("all" in packed) || (column.kind === "prose" && packed.all !== null)) return true;
  return packed.all !== null && !["text", "list"].includes(column.kind) && packed.all !== 0;
}
const columns = data.columns.filter(worthShowing);
const selects = [["model", "Model"], ["provider", "Provider"], ["tokens", "Tokens"], ["precision", "Precision"], ["scope", "Scope"],
  ["direction", "Direction"], ["status", "Status"], ["role", "Role"]];
const state = { key: null, ascending: true, order: allRows, from: 0, drawn: 0, target: null };
let searchable = null;

function compare(key, ascending) {
  const values = field(key);
  const sign = ascending ? 1 : -1;
  const absent = (value) => value === null || (Array.isArray(value) && !value.length);
  return (left, right) => {
    const [a, b] = [values[left], values[right]];
    if (absent(a) || absent(b)) return absent(a) - absent(b) || left - right;
    const by = typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
    return sign * by || left - right;
  };
}
function haystack() {
  const keys = ["variant", "family", "status", "reason", "flags", "anchor", "scope", "precision", "traffic"];
  searchable ??= allRows.map((row) => keys.map((key) => field(key)[row] ?? "").join(" ").toLowerCase());
  return searchable;
}
function filtered() {
  const words = document.getElementById("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = [...document.querySelectorAll("#selects select")].filter((select) => select.value !== "").map((select) => [field(select.name), select.value]);
  return allRows.filter((row) => wanted.every(([values, value]) => String(values[row]) === value) && words.every((word) => haystack()[row].includes(word)));
}
function refresh() {
  const rows = filtered();
  state.order = state.key ? rows.sort(compare(state.key, state.ascending)) : rows;
  drawFrom(0);
  document.getElementById("count").textContent = `${rows.length.toLocaleString("en-US")} of ${data.rows.n.toLocaleString("en-US")} rows`;
}
/** Start the drawn window at that place of the order; a row before it leads to the earlier ones. */
function drawFrom(start) {
  state.from = state.drawn = start;
  table.tBodies[0].replaceChildren();
  drawUpTo(start + CHUNK);
  if (start) table.tBodies[0].prepend(earlierRow());
}
function earlierRow() {
  const button = make("button", { class: "linkish", type: "button" }, `Show ${Math.min(CHUNK, state.from)} of ${state.from.toLocaleString("en-US")} earlier rows`);
  button.addEventListener("click", () => {
    const start = Math.max(0, state.from - CHUNK);
    const fresh = state.order.slice(start, state.from).map(drawRow);
    state.from = start;
    const [box, height] = [table.parentNode, table.offsetHeight];
    table.tBodies[0].firstChild.replaceWith(...(start ? [earlierRow()] : []), ...fresh);
    box.scrollTop += table.offsetHeight - height;
  });
  return make("tr", { class: "earlier" }, make("td", { colspan: columns.length }, button));
}
function drawUpTo(count) {
  const fresh = state.order.slice(state.drawn, count);
  table.tBodies[0].append(...fresh.map(drawRow));
  state.drawn += fresh.length;
}
function cell(column, row) {
  const value = field(column.key)[row];
  const node = make("td", LEFT.has(column.kind) ? { class: `left ${column.kind}` } : {});
  const nothing = value === null || (Array.isArray(value) && !value.length);
  node.append(nothing ? make("span", { class: "missing" }, ["list", "prose"].includes(column.kind) ? "" : "—") : written(value, column.kind));
  const [low, high] = [column.low, column.high].map((key) => (key ? field(key)[row] : null));
  if (!nothing && low !== null && high !== null && low !== high) node.append(" ", make("span", { class: "range" }, range(low, high, column.kind, value)));
  if (column.key === "status") node.firstChild.replaceWith(make("span", { class: `status ${data.faults.includes(value) ? "fault" : value}`, title: field("reason")[row] ?? "" }, written(value, "text")));
  return node;
}
function drawRow(row) {
  const id = field("anchor")[row];
  const line = make("tr", { id, class: field("role")[row] }, ...columns.map((column) => cell(column, row)));
  const opener = make("button", { class: "open", type: "button", "aria-expanded": "false" }, field("variant")[row]);
  opener.addEventListener("click", () => toggle(line, opener, row));
  const link = make("a", { class: "anchor", href: "#" + encodeURIComponent(id), "aria-label": "Link to this row", title: "Link to this row" }, "#");
  link.addEventListener("click", () => copyLink(link.href));
  line.firstChild.replaceChildren(opener, link);
  if (row === state.target) line.classList.add("target");
  return line;
}
async function copyLink(href) {
  try { await navigator.clipboard.writeText(href); say("Link copied"); } catch { say("The link is in the address bar"); }
}
function toggle(line, opener, row) {
  const open = opener.getAttribute("aria-expanded") === "true";
  opener.setAttribute("aria-expanded", String(!open));
  if (open) return line.nextSibling.remove();
  const kinds = { wall_ms: "time", prepare_ms: "time", limit_ms: "time", peak_memory_bytes: "bytes", drop_rate: "percent", tokens: "count" };
  const known = data.details.filter((key) => ![null, ""].includes(field(key)[row]));
  const list = make("dl", {}, ...known.map((key) => make("div", {}, make("dt", {}, key.replace(/_ms$/, "").replaceAll("_", " ")), make("dd", {}, detail(field(key)[row], kinds[key])))));
  return line.after(make("tr", { class: "detail" }, make("td", { colspan: columns.length }, list)));
}
function detail(value, kind) {
  return typeof value === "string" || Number.isInteger(value) ? String(value) : written(value, kind ?? "number");
}
function sortBy(key) {
  state.ascending = state.key === key ? !state.ascending : true;
  state.key = key;
  for (const head of table.tHead.rows[0].cells) head.setAttribute("aria-sort", head.dataset.key === key ? (state.ascending ? "ascending" : "descending") : "none");
  refresh();
  say(`Sorted by ${columns.find((column) => column.key === key).title}, ${state.ascending ? "ascending" : "descending"}`);
}
function drawHead() {
  const heads = columns.map((column) => {
    const button = make("button", { type: "button", title: column.meaning }, column.title);
    button.addEventListener("click", () => sortBy(column.key));
    return make("th", { scope: "col", "aria-sort": "none", "data-key": column.key, class: LEFT.has(column.kind) ? "left" : "" }, button);
  });
  table.tHead.replaceChildren(make("tr", {}, ...heads));
}
function drawSelects() {
  for (const [key, title] of selects) {
    const values = [...new Set(field(key))].filter((value) => value !== null && value !== "");
    if (values.length < 2 || values.length > 200) continue;
    if (typeof values[0] === "number") values.sort((a, b) => a - b);
    const options = values.map((value) => make("option", { value: String(value) }, written(value, "count")));
    document.getElementById("selects").append(make("label", {}, title, make("select", { name: key }, make("option", { value: "" }, "all"), ...options)));
  }
}

function clearFilters() {
  for (const control of document.querySelectorAll("#find, #selects select")) control.value = "";
  refresh();
}

/* ---- links to rows ---- */
function wantedId() { try { return decodeURIComponent(location.hash.slice(1)); } catch { return ""; } }
function goToTarget() {
  const id = wantedId();
  const row = id && !document.querySelector(`section[id="${CSS.escape(id)}"], main[id="${CSS.escape(id)}"], figure[id="${CSS.escape(id)}"]`) ? field("anchor").indexOf(id) : -1;
  const lost = document.getElementById("lost");
  lost.hidden = !id || row >= 0 || Boolean(document.getElementById(id));
  lost.textContent = lost.hidden ? "" : `Row ${id} is not among the rows on this page; results.parquet has them all.`;
  if (row < 0) return;
  if (!state.order.includes(row)) clearFilters();
  state.target = row;
  const place = state.order.indexOf(row);
  if (place < state.from || place >= state.drawn) drawFrom(Math.max(0, place - 30));
  for (const line of table.querySelectorAll("tr.target")) line.classList.remove("target");
  const line = document.getElementById(id);
  line.classList.add("target");
  line.scrollIntoView({ block: "center", behavior: "instant" });
}

if (table) {
  drawHead();
  drawSelects();
  refresh();
  const box = document.getElementById("table-scroll");
  box.addEventListener("scroll", () => { if (box.scrollTop + 2 * box.clientHeight > box.scrollHeight) drawUpTo(state.drawn + CHUNK); }, { passive: true });
  document.getElementById("filters").addEventListener("input", refresh);
  document.getElementById("clear").addEventListener("click", clearFilters);
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("[data-find]")) button.addEventListener("click", () => {
    document.getElementById("find").value = button.dataset.find;
    refresh();
    document.getElementById("rows").scrollIntoView();
  });
  window.addEventListener("hashchange", goToTarget);
  goToTarget();
}
