"use strict";
// Texts from data are only ever set by textContent; elements are made here, so no data can become markup.

const MAX_SERIES = 10;
const MAX_ROWS = 500;
const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440, 2880, 10080];
const at = (id) => document.getElementById(id);
let reports = [];
let newest = null;
let shown = null;
let measure = "";
let asking = 0;

async function ask(path, options = {}) {
  const answer = await fetch(`../${path}`, { credentials: "same-origin", ...options });
  const text = await answer.text();
  let data = {};
  try { data = text ? JSON.parse(text) : {}; } catch { data = {}; }
  if (answer.ok) return { data, headers: answer.headers };
  const said = data.error || { message: `the service answered ${answer.status}`, hint: "" };
  throw Object.assign(new Error(said.hint ? `${said.message}. Next: ${said.hint}` : said.message), { status: answer.status });
}

const kindOf = (type) => {
  if (/^TIMESTAMP/.test(type)) return "instant";
  if (type === "DATE") return "date";
  if (/INT|DOUBLE|FLOAT|DECIMAL|REAL/.test(type)) return "number";
  return "text";
};
const report = () => reports.find((each) => each.path === at("report").value);
const words = (name) => name.replace(/^(avg|max|min)_/, (_, how) => ({ avg: "average ", max: "highest ", min: "lowest " })[how]).replaceAll("_", " ");

function number(value) {
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return value.toLocaleString("en-US", { maximumSignificantDigits: 6 });
}

function moment(text) { return text.slice(0, 19).replace("T", " "); }

function cell(value, kind) {
  if (value === null || value === undefined) return "–";
  if (kind === "number") return number(value);
  if (kind === "instant") return moment(value);
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function notice(text) { at("notice").textContent = text; at("notice").hidden = !text; }

// ---- the question

function fieldFor(parameter, value) {
  const input = make("input");
  input.id = `p-${parameter.name}`;
  input.name = parameter.name;
  input.type = { timestamp: "datetime-local", date: "date", integer: "number", number: "number" }[parameter.type] || "text";
  if (parameter.type === "number") input.step = "any";
  if (parameter.name === "device_id") { input.setAttribute("list", "devices"); input.placeholder = "all"; input.autocomplete = "off"; }
  input.value = value || parameter.default || "";
  input.title = parameter.meaning || "";
  const unit = parameter.type === "timestamp" ? " (UTC)" : "";
  const label = make("label", "", parameter.name.replaceAll("_", " ") + unit);
  label.htmlFor = input.id;
  return make("div", `field ${parameter.type}`, label, input);
}

function suggested(asked) {
  const names = new Set(asked.parameters.map((each) => each.name));
  if (!newest || !names.has("from")) return {};
  const from = new Date(newest.getTime() - 864e5);
  const first = oldest && oldest > from ? oldest : from;
  const step = STEPS.find((each) => (newest - first) / 6e4 / each <= 150) || 10080;
  const whole = new Date(Math.ceil(first / (step * 6e4)) * step * 6e4);
  return { from: (whole < newest ? whole : first).toISOString().slice(0, 16), minutes: String(step) };
}

function showFields(given) {
  const asked = report();
  const values = { ...suggested(asked), ...given };
  at("parameters").replaceChildren(...asked.parameters.map((each) => fieldFor(each, values[each.name])));
  at("about").textContent = asked.fault ? `${asked.fault.message}. Next: ${asked.fault.hint}` : asked.description;
}

function query() {
  const values = new URLSearchParams();
  for (const parameter of report().parameters) {
    const text = at(`p-${parameter.name}`).value.trim();
    if (text) values.set(parameter.name, parameter.type === "timestamp" ? `${text}Z` : text);
  }
  return values;
}

function address(values, format) {
  const all = new URLSearchParams(values);
  if (format) all.set("format", format);
  const text = all.toString();
  return report().path.slice(1) + (text ? `?${text}` : "");
}

async function show() {
  const turn = ++asking;
  const asked = report();
  const values = query();
  at("rows").classList.add("busy");
  at("plot").classList.add("busy");
  try {
    const { data, headers } = await ask(address(values, "json"));
    if (turn !== asking) return;
    const list = Object.values(data).find((each, place) => Array.isArray(each) && Object.keys(data)[place] !== "warnings");
    const rows = list || [Object.fromEntries(Object.entries(data).filter(([name]) => name !== "warnings"))];
    shown = { asked, rows };
    const [, took] = /dur=([\d.]+)/.exec(headers.get("Server-Timing") || "") || [];
    at("updated").textContent = `data as of ${moment(headers.get("X-Data-As-Of") || "").slice(11)} UTC${took ? `, ${number(Number(took))} ms` : ""}`;
    for (const format of ["csv", "parquet", "xlsx"]) at(`as-${format}`).href = `../${address(values, format)}`;
    history.replaceState(null, "", `#${new URLSearchParams({ report: asked.path, ...Object.fromEntries(values) })}`);
    notice((data.warnings || []).map((each) => (each.object ? `${each.object}: ${each.message}` : each.message)).join(" · "));
    showTable();
    showMeasures();
  } catch (error) {
    if (turn === asking) problem(error);
  } finally {
    if (turn === asking) { at("rows").classList.remove("busy"); at("plot").classList.remove("busy"); }
  }
}

// ---- the rows

function showTable() {
  const { asked, rows } = shown;
  const columns = asked.columns.map((each) => [each.name, kindOf(each.type)]);
  at("row-count").textContent = rows.length > MAX_ROWS ? `${MAX_ROWS} of ${number(rows.length)}; download for all` : number(rows.length);
  if (!rows.length) {
    at("rows").replaceChildren(make("p", "empty", "No rows. Widen the span, or choose another device."));
    return;
  }
  const head = make("tr", "", ...columns.map(([name, kind]) => make("th", kind === "number" ? "number" : "", words(name))));
  const lines = rows.slice(0, MAX_ROWS).map((row) => make("tr", "", ...columns.map(([name, kind]) => make("td", kind === "number" ? "number" : "", cell(row[name], kind)))));
  at("rows").replaceChildren(make("table", "", make("thead", "", head), make("tbody", "", ...lines)));
}

// ---- the chart

function showMeasures() {
  const { asked, rows } = shown;
  const numbers = asked.columns.filter((each) => kindOf(each.type) === "number").map((each) => each.name);
  const drawn = numbers.filter((name) => rows.some((row) => typeof row[name] === "number"));
  at("charted").hidden = !drawn.length || !rows.length || !asked.columns.some((each) => each.name === "device_id");
  if (at("charted").hidden) return;
  if (!drawn.includes(measure)) measure = drawn[0];
  at("measures").replaceChildren(...drawn.map((name) => {
    const button = make("button", "", words(name));
    button.type = "button";
    button.setAttribute("aria-pressed", String(name === measure));
    button.addEventListener("click", () => { measure = name; showMeasures(); });
    return button;
  }));
  at("chart-title").textContent = words(measure).replace(/^./, (letter) => letter.toUpperCase());
  draw();
}

function draw() {
  const { asked, rows } = shown;
  const time = ["date", "time"].map((name) => asked.columns.find((each) => each.name === name)).find(Boolean)
    || asked.columns.find((each) => ["instant", "date"].includes(kindOf(each.type)) && asked.name === "over_time");
  if (time) drawLines(rows, time.name);
  else drawBars(rows);
}

function ticks(low, high, count) {
  const raw = (high - low || Math.abs(high) || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= raw);
  const first = Math.floor(low / step) * step;
  const found = [];
  for (let value = first; value < high + step; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

function timeTicks(low, high, count) {
  const minutes = STEPS.concat([20160, 43200, 129600, 525600]).find((step) => (high - low) / 6e4 / step <= count) || 525600;
  const step = minutes * 6e4;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(value);
  return found;
}

function timeText(value, span) {
  const text = new Date(value).toISOString();
  if (span > 4 * 864e5) return text.slice(5, 10);
  return text.slice(11, 16) === "00:00" ? text.slice(5, 10) : text.slice(11, 16);
}

function seriesOf(rows, time) {
  const found = new Map();
  for (const row of rows) {
    const name = row.device_id ?? "";
    const x = Date.parse(row[time]);
    if (!found.has(name)) found.set(name, []);
    found.get(name).push([x, row[measure]]);
  }
  return [...found].slice(0, MAX_SERIES).map(([name, points]) => ({ name, points: points.sort((a, b) => a[0] - b[0]) }));
}

function drawLines(rows, time) {
  const series = seriesOf(rows, time);
  const points = series.flatMap((each) => each.points).filter(([, y]) => typeof y === "number");
  const names = new Set(rows.map((row) => row.device_id));
  at("left-out").hidden = names.size <= MAX_SERIES;
  at("left-out").textContent = `The first ${MAX_SERIES} of ${number(names.size)} devices are drawn; choose one to see another.`;
  const width = at("plot").clientWidth, height = at("plot").clientHeight;
  const yTicks = ticks(Math.min(...points.map((each) => each[1])), Math.max(...points.map((each) => each[1])), height < 300 ? 4 : 6);
  const [low, high] = [yTicks[0], yTicks.at(-1)];
  const left = 12 + 7.2 * Math.max(...yTicks.map((each) => number(each).length)), right = 10, top = 10, bottom = 26;
  const xs = points.map((each) => each[0]);
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const x = (value) => (last === first ? (left + width - right) / 2 : left + ((value - first) / (last - first)) * (width - left - right));
  const y = (value) => top + (1 - (value - low) / (high - low || 1)) * (height - top - bottom);
  const parts = yTicks.flatMap((value) => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
    svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, number(value)),
  ]);
  for (const value of timeTicks(first, last, Math.max(2, Math.floor((width - left) / 90)))) {
    const place = Math.min(Math.max(x(value), left + 14), width - right - 14);
    parts.push(svg("text", { x: place, y: height - 6, "text-anchor": "middle" }, timeText(value, last - first)));
  }
  series.forEach((each, place) => {
    const known = each.points.filter(([, value]) => typeof value === "number");
    const path = each.points.reduce((text, [px, py], number_) => {
      if (typeof py !== "number") return text;
      const begins = !text || typeof each.points[number_ - 1]?.[1] !== "number";
      return `${text}${begins ? "M" : "L"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`;
    }, "");
    parts.push(svg("path", { class: `line s${place}`, d: path }));
    if (known.length < 40) parts.push(...known.map(([px, py]) => svg("circle", { class: `dot s${place}`, cx: x(px), cy: y(py), r: 2.4 })));
  });
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  const image = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${words(measure)} of ${series.length} devices over time` }, ...parts, cursor);
  at("plot").replaceChildren(image);
  at("legend").replaceChildren(...series.map((each, place) => make("li", "", make("i", `s${place}`), each.name)));
  const times = [...new Set(xs)].sort((a, b) => a - b);
  at("plot").onpointermove = (event) => tip(event, { series, times, x, cursor, span: last - first });
  at("plot").onpointerleave = () => { at("plot").querySelector(".tip")?.remove(); cursor.setAttribute("visibility", "hidden"); };
}

function tip(event, { series, times, x, cursor }) {
  const box = at("plot").getBoundingClientRect();
  const place = event.clientX - box.left;
  const near = times.reduce((best, each) => (Math.abs(x(each) - place) < Math.abs(x(best) - place) ? each : best), times[0]);
  cursor.setAttribute("x1", x(near));
  cursor.setAttribute("x2", x(near));
  cursor.setAttribute("visibility", "visible");
  const lines = series.flatMap((each, index) => {
    const value = each.points.find((point) => point[0] === near)?.[1];
    return typeof value === "number" ? [make("div", "", make("span", "", make("b", `t${index}`, each.name)), make("span", "", number(value)))] : [];
  });
  const held = at("plot").querySelector(".tip") || make("div", "tip");
  held.replaceChildren(make("strong", "", moment(new Date(near).toISOString())), ...lines);
  at("plot").append(held);
  held.style.left = `${x(near) > box.width / 2 ? x(near) - held.offsetWidth - 12 : x(near) + 12}px`;
}

function drawBars(rows) {
  const best = rows.filter((row) => typeof row[measure] === "number").sort((a, b) => b[measure] - a[measure]).slice(0, 12);
  at("left-out").hidden = rows.length <= best.length;
  at("left-out").textContent = `The ${best.length} highest of ${number(rows.length)}.`;
  at("legend").replaceChildren();
  const width = at("plot").clientWidth, height = at("plot").clientHeight;
  const label = Math.min(width * 0.35, 16 + 7.2 * Math.max(...best.map((row) => String(row.device_id ?? "").length)));
  const high = Math.max(0, ...best.map((row) => row[measure])), low = Math.min(0, ...best.map((row) => row[measure]));
  const room = width - label - 80;
  const step = Math.min(40, height / best.length);
  const x = (value) => label + ((value - low) / (high - low || 1)) * room;
  const parts = best.flatMap((row, place) => {
    const value = row[measure];
    const y = place * step;
    return [
      svg("text", { x: label - 8, y: y + step / 2 + 4, "text-anchor": "end" }, String(row.device_id ?? "").slice(0, Math.floor(label / 7))),
      svg("rect", { class: "bar", x: Math.min(x(0), x(value)), y: y + step * 0.15, width: Math.max(Math.abs(x(value) - x(0)), 1), height: step * 0.7, rx: 3 }),
      svg("text", { x: Math.max(x(value), x(0)) + 6, y: y + step / 2 + 4 }, number(value)),
    ];
  });
  at("plot").onpointermove = null;
  at("plot").replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${words(measure)} by device` }, ...parts));
}

// ---- the page

function problem(error) {
  if (error.status === 401) {
    at("sign-in").hidden = false;
    at("board").hidden = true;
    at("key").focus();
    notice("");
  } else notice(error instanceof TypeError ? "The service cannot be reached." : error.message);
}

let oldest = null;

async function open() {
  try {
    reports = (await ask("analytics")).data.reports.sort((a, b) => (a.name === "over_time" ? -1 : b.name === "over_time" ? 1 : a.title.localeCompare(b.title)));
    at("sign-in").hidden = true;
    at("board").hidden = false;
    const seen = (await ask("analytics/overview")).data;
    newest = seen.max_timestamp ? new Date(seen.max_timestamp) : null;
    oldest = seen.min_timestamp ? new Date(seen.min_timestamp) : null;
    await suggestDevices();
    at("report").replaceChildren(...reports.map((each) => Object.assign(make("option", "", each.title), { value: each.path })));
    const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    if (reports.some((each) => each.path === given.report)) at("report").value = given.report;
    showFields(Object.fromEntries(Object.entries(given).map(([name, text]) => [name, text.replace(/Z$/, "")])));
    await show();
  } catch (error) { problem(error); }
  ask("ops/session").then(({ data }) => { at("sign-out").hidden = !data.keys; }, () => {});
}

async function suggestDevices() {
  const list = make("datalist");
  list.id = "devices";
  const known = (await ask("analytics/devices")).data.devices.slice(0, 1000);
  list.append(...known.map((each) => Object.assign(make("option"), { value: each.device_id })));
  at("board").append(list);
}

at("report").addEventListener("change", () => { showFields({}); show(); });
at("ask").addEventListener("submit", (event) => { event.preventDefault(); show(); });
at("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("sign-in-error").textContent = "";
  try {
    const body = JSON.stringify({ key: at("key").value.trim() });
    await ask("ops/session", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    at("key").value = "";
    await open();
  } catch (error) { at("sign-in-error").textContent = error.message; }
});
at("sign-out").addEventListener("click", async () => { await ask("ops/session", { method: "DELETE" }).catch(() => {}); location.reload(); });
addEventListener("resize", () => { if (shown && !at("charted").hidden) draw(); });
open();
