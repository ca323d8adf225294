"use strict";
/* Charts, drawn by Plotly from the same rows as the table when they come into view. */
const STAGES = ["gate", "plan", "permute", "up_projection", "down_projection", "combine"];
const HATCH = ["", "/", ".", "", "\\", "x"];
const NOISE = data.noise;
const hidden = new Set();
const choice = { family: data.families[0], tokens: null, against: null, stageTokens: null };
const AGAINST = { fidelity_error: ["Fidelity error", "number"], peak_memory_bytes: ["Peak memory", "bytes"], energy_j_per_token: ["Energy, J per token", "number"], usd_per_mtok: ["US dollars per million tokens", "number"] };

/* ---- rows and axes ---- */
function measured(family) {
  const [families, statuses, replicates] = ["family", "status", "replicate"].map(field);
  return allRows.filter((row) => families[row] === family && statuses[row] === "measured" && replicates[row] === 0);
}
/** Rows of the widest scope there is, of arms and (for scale) the dense FFN. */
function contenders(family, withDense = true) {
  const rows = measured(family).filter((row) => field("role")[row] === "arm" || (withDense && field("provider")[row] === "dense-ffn"));
  const scopes = new Set(rows.map((row) => field("scope")[row]));
  const scope = ["layer", "experts"].find((name) => scopes.has(name));
  return scope ? rows.filter((row) => field("scope")[row] === scope) : [];
}
function byVariant(rows) {
  const groups = new Map();
  for (const row of rows) {
    const name = field("variant")[row];
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(row);
  }
  for (const group of groups.values()) group.sort((a, b) => field("tokens")[a] - field("tokens")[b]);
  return groups;
}
function distinct(rows, key) { return [...new Set(rows.map((row) => field(key)[row]))].sort((a, b) => a - b); }
function distinctText(rows, key) { return [...new Set(rows.map((row) => field(key)[row]))]; }
function known(rows, ...keys) { return rows.filter((row) => keys.every((key) => field(key)[row] !== null)); }

function logTicks(low, high) {
  const decades = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) decades.push(power);
  const tries = [[1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]].map((steps) => decades.flatMap((power) => steps.map((step) => step * 10 ** power)));
  for (const every of [2, 3, 4]) tries.push(decades.filter((power) => power % every === 0).map((power) => 10 ** power));
  const inside = tries.map((ticks) => ticks.filter((tick) => tick >= low && tick <= high));
  return inside.find((ticks) => ticks.length <= 6) ?? inside[inside.length - 1];
}
function axis(title, values, kind, ticks = null) {
  const positive = values.filter((value) => value > 0);
  let [low, high] = [Math.min(...positive), Math.max(...positive)];
  const room = Math.max(1.12, (high / low) ** 0.07);
  [low, high] = [low / room, high * room];
  const tickvals = ticks && ticks.length <= 8 ? ticks : logTicks(low, high);
  return { ...axisLook(title), type: "log", range: [Math.log10(low), Math.log10(high)], tickmode: "array", tickvals, ticktext: tickvals.map((tick) => tickText(tick, kind)) };
}
function tickText(tick, kind) {
  if (kind === "count") return written(tick, kind);
  const [size, name] = unit(tick * 1.0000001, kind);
  const short = Number((tick / size).toPrecision(2));
  return (short < 1e-3 || short >= 1e6 ? short.toExponential().replace("e+", "e") : short.toLocaleString("en-US", { maximumFractionDigits: 6 })) + name;
}
function axisLook(title) {
  return { title: { text: title, font: { size: 12.5 }, standoff: 8 }, gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, automargin: true, fixedrange: false };
}
function base(extra) {
  const narrow = window.innerWidth < 480;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest", modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--line"), activecolor: css("--soft") }, dragmode: narrow ? false : "zoom",
    font: { family: css("--sans"), size: 12, color: css("--soft") }, margin: { l: 8, r: 14, t: 14, b: 8 },
    hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--ink"), family: css("--sans"), size: 12.5 } }, ...extra,
  };
}
function hover(row, ...keys) {
  const lines = keys.map((key) => {
    const column = data.columns.find((each) => each.key === key);
    return field(key)[row] === null ? "" : `${column.title}: ${plain(written(field(key)[row], column.kind))}`;
  });
  return [`<b>${plain(field("variant")[row])}</b>, T = ${written(field("tokens")[row], "count")}`, ...lines.filter(Boolean)].join("<br>");
}
function points(name, rows, x, y, extra = {}) {
  const { colour, mark, dash } = look(name);
  return {
    type: "scatter", mode: "lines+markers", name: plain(name), x: rows.map((row) => field(x)[row]), y: rows.map((row) => field(y)[row]),
    customdata: rows.map((row) => field("anchor")[row]), hovertemplate: "%{text}<extra></extra>", text: rows.map((row) => hover(row, "latency_ms", "speedup", y, "status")),
    line: { color: colour, dash, width: 1.8 }, marker: { color: colour, symbol: mark, size: 8 }, ...extra,
  };
}
function visible(groups) { return [...groups].filter(([name]) => !hidden.has(name)); }
function all(rows, ...keys) { return keys.flatMap((key) => rows.map((row) => field(key)[row])).filter((value) => value !== null); }

/* ---- the charts: each gives {traces, layout, alt} or {empty} ---- */
const NOTHING = { empty: "No arm of this problem was timed." };
const CHARTS = {
  latency() {
    const rows = contenders(choice.family);
    if (!rows.length) return NOTHING;
    const traces = visible(byVariant(rows)).map(([name, group]) => points(name, group, "tokens", "latency_ms", { error_y: bars(group) }));
    const limits = distinctText(known(rows, "limit_ms"), "precision").map((precision) => limitLine(rows, precision));
    traces.unshift(...limits);
    const annotations = limits.map((line) => ({ x: Math.log10(line.x[0]), y: Math.log10(line.y[0]), text: limits.length > 1 ? plain(line.name) : "limit", showarrow: false, xanchor: "left", yanchor: "top", font: { size: 11.5 } }));
    const tokens = distinct(rows, "tokens");
    const y = [...all(rows, "latency_ms", "latency_ms_low", "latency_ms_high"), ...limits.flatMap((line) => line.y)];
    return { traces, layout: { xaxis: axis("Tokens", tokens, "count", tokens), yaxis: axis("Latency of one layer", y, "time"), annotations }, alt: `Latency over ${tokens.length} token counts for ${traces.length - limits.length} variants. ${fastest(rows)}` };
  },
  cost() {
    const rows = known(contenders(choice.family), "usd_per_mtok");
    if (!rows.length) return { empty: `Cost is not drawn: ${data.absent.cost}.` };
    const traces = visible(byVariant(rows)).map(([name, group]) => points(name, group, "latency_ms", "usd_per_mtok"));
    return { traces, layout: { xaxis: axis("Step latency of one layer", all(rows, "latency_ms"), "time"), yaxis: axis("US dollars per million tokens and layer", all(rows, "usd_per_mtok"), "number") }, alt: `Cost against step latency for ${traces.length} variants as the token count grows.` };
  },
  pareto() {
    const every = contenders(choice.family, false);
    if (!every.length) return NOTHING;
    choice.tokens = offer("pareto", "tokens", "Tokens", distinct(every, "tokens"), choice.tokens, (value) => written(value, "count"));
    choice.against = offer("pareto", "against", "Latency against", Object.keys(AGAINST), choice.against ?? "fidelity_error", (key) => AGAINST[key][0]);
    const [title, kind] = AGAINST[choice.against];
    const rows = known(every.filter((row) => field("tokens")[row] === choice.tokens), choice.against).filter((row) => field(choice.against)[row] > 0);
    if (!rows.length) return { empty: absent(choice.against, title) };
    const onFront = (row) => field("front_" + choice.against)[row];
    const front = rows.filter(onFront).sort((a, b) => field("latency_ms")[a] - field("latency_ms")[b]);
    const traces = visible(byVariant(rows)).map(([name, group]) => points(name, group, "latency_ms", choice.against, { mode: "markers", marker: { color: look(name).colour, symbol: group.map((row) => look(name).mark + (onFront(row) ? "" : "-open")), size: 11, line: { width: 2 } } }));
    traces.unshift({ type: "scatter", mode: "lines", x: front.map((row) => field("latency_ms")[row]), y: front.map((row) => field(choice.against)[row]), line: { shape: "hv", color: css("--soft"), width: 1.2 }, hoverinfo: "skip" });
    const noise = choice.against === "fidelity_error" ? [{ type: "rect", xref: "paper", x0: 0, x1: 1, y0: 1e-300, y1: NOISE, fillcolor: css("--wash"), line: { width: 0 }, layer: "below" }] : [];
    const annotations = noise.map(() => ({ xref: "paper", x: 0.99, y: Math.log10(NOISE), text: "float32 noise", showarrow: false, xanchor: "right", yanchor: "top", font: { size: 11.5 } }));
    const y = [...all(rows, choice.against), ...noise.map(() => 2 * NOISE)];
    return { traces, layout: { shapes: noise, annotations, xaxis: axis("Latency of one layer", all(rows, "latency_ms"), "time"), yaxis: axis(title, y, kind) }, alt: `Latency against ${title.toLowerCase()} of ${rows.length} arms at ${choice.tokens} tokens. On the front: ${front.map((row) => field("variant")[row]).join(", ")}.` };
  },
  roofline() {
    const rows = known(contenders(choice.family, false), "tflops", "intensity");
    if (!rows.length) return { empty: "No timed row of this problem has both its work and its bytes." };
    const ceiling = data.ceilings[field("run_id")[rows[0]]];
    const x = all(rows, "intensity"), y = all(rows, "tflops");
    const traces = visible(byVariant(rows)).map(([name, group]) => points(name, group, "intensity", "tflops", { mode: "markers" }));
    const roofs = ceiling ? Object.entries(ceiling.tflops).filter(([precision]) => rows.some((row) => field("precision")[row] === precision)) : [];
    const annotations = [];
    for (const [precision, peak] of roofs) {
      const ridge = (peak * 1e3) / ceiling.gbs;
      const left = Math.min(...x, ridge) / 2, right = Math.max(...x, ridge) * 2.5;
      traces.unshift({ type: "scatter", mode: "lines", x: [left, ridge, right], y: [(left * ceiling.gbs) / 1e3, peak, peak], line: { color: css("--ink"), width: 1.4 }, hovertemplate: `${plain(precision)}: ${significant(peak)} TFLOP/s, ${significant(ceiling.gbs)} GB/s<extra></extra>` });
      annotations.push({ x: Math.log10(right), y: Math.log10(peak), text: `${plain(precision)} GEMM ${significant(peak)} TFLOP/s`, showarrow: false, xanchor: "right", yanchor: "bottom", font: { size: 11.5 } });
      x.push(left, right); y.push(peak * 1.6, (left * ceiling.gbs) / 1e3);
    }
    const roofless = distinctText(rows, "precision").filter((precision) => !roofs.some(([name]) => name === precision));
    if (roofless.length) annotations.push({ xref: "paper", yref: "paper", x: 0.02, y: 0.98, text: `No ceiling was measured for ${plain(roofless.join(", "))}.`, showarrow: false, xanchor: "left", font: { size: 11.5 } });
    return { traces, layout: { xaxis: axis("FLOP per compulsory byte", x, "number"), yaxis: axis("TFLOP/s", y, "number"), annotations }, alt: `Roofline: ${rows.length} measured rows against ${roofs.length} measured ceilings.` };
  },
  load() {
    const rows = known(measured(choice.family).filter((row) => field("role")[row] === "arm"), "load_max_over_mean", "active_experts");
    if (!rows.length) return { empty: "No timed row of this problem recorded how its tokens were spread over experts." };
    const tokens = distinct(rows, "tokens");
    const mean = (key, count, per) => { const own = rows.filter((row) => field("tokens")[row] === count); return own.reduce((sum, row) => sum + field(key)[row] / (per ? field(per)[row] : 1), 0) / own.length; };
    const [busiest, share] = [tokens.map((count) => mean("load_max_over_mean", count)), tokens.map((count) => 100 * mean("active_experts", count, "routed_experts"))];
    const [one, two] = palette();
    const curve = (y, yaxis, colour, symbol, text) => ({ type: "scatter", mode: "lines+markers", x: tokens, y, yaxis, line: { color: colour, width: 1.8 }, marker: { color: colour, symbol, size: 8 }, hovertemplate: text });
    const traces = [curve(busiest, "y", one, "circle", "busiest expert: %{y:.3g} × mean<extra></extra>"), curve(share, "y2", two, "square", "%{y:.3g} % of experts active<extra></extra>")];
    const low = { ...axisLook("Busiest / mean"), domain: [0.56, 1], rangemode: "tozero" }, high = { ...axisLook("Active, %"), domain: [0, 0.44], range: [0, 105] };
    return { traces, layout: { xaxis: { ...axis("Tokens", tokens, "count", tokens), anchor: "y2" }, yaxis: low, yaxis2: high }, alt: `Load per expert: at ${tokens[tokens.length - 1]} tokens the busiest expert has ${significant(busiest[busiest.length - 1])} times the mean and ${significant(share[share.length - 1])} % of experts are active.` };
  },
  stages() {
    const every = measured(choice.family).filter((row) => STAGES.includes(field("scope")[row]) && field("role")[row] === "arm");
    if (!every.length) return { empty: "This run timed no stages; a suite with scope = [\"gate\", \"up_projection\", …] does." };
    choice.stageTokens = offer("stages", "stageTokens", "Tokens", distinct(every, "tokens"), choice.stageTokens, (value) => written(value, "count"));
    const rows = every.filter((row) => field("tokens")[row] === choice.stageTokens);
    const names = [...byVariant(rows).keys()].reverse();
    const colours = [...palette()];
    const traces = STAGES.map((stage, place) => {
      const own = names.map((name) => rows.find((row) => field("variant")[row] === name && field("scope")[row] === stage));
      return { type: "bar", orientation: "h", name: stage.replace("_", " "), y: names.map(plain), x: own.map((row) => (row === undefined ? null : field("latency_ms")[row])), customdata: own.map((row) => (row === undefined ? null : field("anchor")[row])), marker: { color: colours[place], line: { color: css("--panel"), width: 1 }, pattern: { shape: HATCH[place], size: 6, solidity: 0.25 } }, hovertemplate: `${stage.replace("_", " ")}: %{x:.3g} ms<extra></extra>` };
    });
    const whole = contenders(choice.family, false).filter((row) => field("tokens")[row] === choice.stageTokens && names.includes(field("variant")[row]) && field("scope")[row] === "layer");
    traces.push({ type: "scatter", mode: "markers", name: "layer", x: whole.map((row) => field("latency_ms")[row]), y: whole.map((row) => plain(field("variant")[row])), marker: { symbol: "diamond", size: 11, color: css("--ink") }, hovertemplate: "whole layer: %{x:.3g} ms<extra></extra>" });
    return { traces, layout: { barmode: "stack", showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" }, xaxis: { ...axisLook("Milliseconds"), rangemode: "tozero" }, yaxis: { automargin: true } }, alt: `Time by stage of ${names.length} variants at ${choice.stageTokens} tokens.` };
  },
};
function bars(rows) {
  const [middle, low, high] = ["latency_ms", "latency_ms_low", "latency_ms_high"].map((key) => rows.map((row) => field(key)[row]));
  return { type: "data", symmetric: false, array: high.map((value, at) => (value ?? middle[at]) - middle[at]), arrayminus: low.map((value, at) => middle[at] - (value ?? middle[at])), thickness: 1.2, width: 4 };
}
/** What the measured ceilings allow, over T. */
function limitLine(rows, precision) {
  const own = known(rows, "limit_ms").filter((row) => field("precision")[row] === precision);
  const x = distinct(own, "tokens");
  const y = x.map((tokens) => Math.min(...own.filter((row) => field("tokens")[row] === tokens).map((row) => field("limit_ms")[row])));
  return { type: "scatter", mode: "lines", name: `limit ${precision}`, x, y, line: { color: css("--soft"), width: 1, dash: "dot" }, hovertemplate: "limit by the measured ceilings: %{y:.3g} ms<extra></extra>" };
}
function fastest(rows) {
  const arms = rows.filter((row) => field("role")[row] === "arm");
  return distinct(arms, "tokens").slice(0, 12).map((tokens) => {
    const best = arms.filter((row) => field("tokens")[row] === tokens).reduce((a, b) => (field("latency_ms")[a] <= field("latency_ms")[b] ? a : b));
    return `Fastest at ${tokens}: ${field("variant")[best]}, ${written(field("latency_ms")[best], "time")}.`;
  }).join(" ");
}
function absent(key, title) {
  const reason = { energy_j_per_token: data.absent.energy, usd_per_mtok: data.absent.cost, peak_memory_bytes: data.absent["peak memory"] }[key];
  return `${title.split(",")[0]} is not drawn: ${reason ?? "no row of this problem has it"}.`;
}
/** A select in a chart's controls; gives the value that holds. */
function offer(chart, name, title, values, wanted, write) {
  const value = values.includes(wanted) ? wanted : values[values.length - 1];
  const controls = document.querySelector(`#chart-${chart} .controls`);
  controls.querySelector(`[name=${name}]`)?.parentNode.remove();
  if (values.length < 2) return value;
  const select = make("select", { name }, ...values.map((each) => make("option", { value: String(each) }, write(each))));
  select.value = String(value);
  select.addEventListener("change", () => { choice[name] = values.find((each) => String(each) === select.value); draw(chart); document.querySelector(`#chart-${chart} [name=${name}]`).focus(); });
  controls.append(make("label", {}, title, select));
  return value;
}

/* ---- drawing ---- */
const CONFIG = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
function draw(key) {
  const figure = document.getElementById(`chart-${key}`);
  const [plot, message] = [figure.querySelector(".chart"), figure.querySelector(".empty")];
  const found = CHARTS[key]();
  message.hidden = !found.empty;
  plot.hidden = Boolean(found.empty);
  figure.classList.toggle("bare", plot.hidden);
  message.textContent = found.empty ?? "";
  if (found.empty) return;
  plot.setAttribute("aria-label", found.alt);
  Plotly.react(plot, found.traces, base(found.layout), CONFIG);
  plot.removeAllListeners("plotly_click");
  plot.on("plotly_click", (event) => { const anchor = event.points[0]?.customdata; if (anchor) location.hash = encodeURIComponent(anchor); });
}
function drawRadar(plot) {
  const { axes, polygons, baseline } = data.radars[Number(plot.dataset.radar)];
  const ratios = polygons.flatMap((polygon) => polygon.ratios).filter((ratio) => ratio !== null && ratio > 0);
  const low = Math.min(-1, Math.floor(Math.log2(Math.min(...ratios)) - 0.01)) - 0.6, high = Math.max(1, Math.ceil(Math.log2(Math.max(...ratios))));
  const step = Math.ceil((high - low) / 5);
  const ticks = [];
  for (let tick = 0; tick <= high; tick += step) ticks.push(tick);
  for (let tick = -step; tick > low; tick -= step) ticks.unshift(tick);
  const wrapped = axes.map(({ name, missing }) => { const text = plain(name).replace(" ", "<br>"); return missing ? `<i>[${text}]</i>` : text; });
  const traces = polygons.map(({ variant, ratios: own }) => {
    const { colour, mark, dash } = look(variant);
    const isBase = variant === baseline;
    const r = own.map((ratio) => (ratio > 0 ? Math.log2(ratio) - low : null));
    return { type: "scatterpolar", mode: "lines+markers", name: plain(variant), theta: [...wrapped, wrapped[0]], r: [...r, r[0]], connectgaps: false, fill: "none", line: { color: isBase ? css("--ink") : colour, width: isBase ? 1.4 : 2, dash: isBase ? "dash" : dash }, marker: { color: isBase ? css("--ink") : colour, symbol: mark, size: isBase ? 5 : 8 }, text: [...own, own[0]].map((ratio, at) => `<b>${plain(variant)}</b><br>${plain(axes[at % axes.length].name)}: ${ratio === null ? "not measured" : significant(ratio) + "×"}`), hovertemplate: "%{text}<extra></extra>" };
  });
  const polar = {
    bgcolor: "rgba(0,0,0,0)", gridshape: "linear",
    radialaxis: { range: [0, high - low + 0.25], tickmode: "array", tickvals: ticks.map((tick) => tick - low), ticktext: ticks.map((tick) => (tick < 0 ? `1/${2 ** -tick}` : `${2 ** tick}×`)), gridcolor: css("--line"), linecolor: "rgba(0,0,0,0)", tickfont: { size: 10.5 }, angle: 90, tickangle: 90 },
    angularaxis: { rotation: 90, direction: "clockwise", gridcolor: css("--line"), linecolor: css("--line"), tickfont: { size: 12.5, color: css("--ink") } },
  };
  plot.setAttribute("aria-label", `Radar against ${baseline}. ` + polygons.map(({ variant, ratios: own }) => `${variant}: ` + axes.map(({ name }, at) => `${name} ${own[at] === null ? "missing" : significant(own[at]) + " times"}`).join(", ")).join(". "));
  Plotly.react(plot, traces, base({ polar, margin: { l: 60, r: 60, t: 44, b: 44 }, dragmode: false }), { ...CONFIG, displayModeBar: false });
}
const drawn = new Set();
function drawPlot(plot) {
  if (plot.dataset.radar !== undefined) drawRadar(plot);
  else draw(plot.dataset.chart);
}
function redraw() {
  drawLegend();
  for (const head of document.querySelectorAll("[data-variant]")) { head.querySelector("svg")?.remove(); head.prepend(swatch(head.dataset.variant)); }
  for (const plot of drawn) drawPlot(plot);
}
function drawLegend() {
  const legend = document.getElementById("legend");
  const present = new Set(data.families.length ? contenders(choice.family).map((row) => field("variant")[row]) : []);
  legend?.replaceChildren(...data.variants.filter(({ name }) => present.has(name)).map(({ name }) => {
    const button = make("button", { type: "button", "aria-pressed": String(!hidden.has(name)), title: "Show or hide in the charts" }, swatch(name), name);
    button.addEventListener("click", () => { if (!hidden.delete(name)) hidden.add(name); redraw(); });
    return button;
  }));
}
function drawFamilies() {
  const select = document.getElementById("family");
  if (!select || data.families.length < 2) return;
  select.append(...data.families.map((family) => make("option", {}, family)));
  select.addEventListener("change", () => { choice.family = data.families[select.selectedIndex]; redraw(); });
  document.getElementById("pick-family").hidden = false;
}

drawFamilies();
redraw();
window.addEventListener("plotly-ready", () => {
  const watcher = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting && !drawn.has(target)) { drawn.add(target); drawPlot(target); }
  }, { rootMargin: "300px" });
  for (const plot of document.querySelectorAll(".chart")) watcher.observe(plot);
  window.addEventListener("theme", redraw);
});
