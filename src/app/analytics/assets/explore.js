"use strict";
// Reports over the lake: a line chart in plain SVG, whose view is in the address, and the rows below it.
const RANGES = [["1h", "1 h", 36e5], ["6h", "6 h", 216e5], ["24h", "24 h", 864e5], ["7d", "7 d", 6048e5], ["30d", "30 d", 2592e6], ["all", "All", 0], ["custom", "Custom", 0]];
const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440, 2880, 10080];
const UNITS = { voltage: "V", current: "A", power: "W", temperature: "°C", soc: "%" };
const LINES = 8, POINTS = 180, FIRST_ROWS = 12;
let reports = [], lake = null, shown = null, zoom = null, drag = null, cross = null, rowsShown = FIRST_ROWS, askedAt = 0;
const hiddenSeries = new Set((view.get("hide") || "").split("\n").filter(Boolean));

// ---- the question

const report = () => reports.find((each) => each.name === (view.get("report") || "over_time")) || reports[0];
const has = (name) => report().parameters.some((each) => each.name === name);
const stepText = (minutes) => (minutes < 60 ? `${minutes} min` : minutes < 1440 ? `${minutes / 60} h` : `${minutes / 1440} day${minutes > 1440 ? "s" : ""}`);
function rangeNow() {
  const name = view.get("range") || "6h", known = RANGES.find(([key]) => key === name) || RANGES[1], now = Date.now() + skew;
  if (name === "custom") return [new Date(view.get("from") || now - 216e5), new Date(view.get("to") || now)];
  if (name === "all") return [lake.first || new Date(now - 864e5), new Date(now)];
  return [new Date(now - known[2]), new Date(now)];
}
function stepNow([from, to]) { return Number(view.get("bucket")) || STEPS.find((step) => (to - from) / 6e4 / step <= POINTS) || 10080; }
function query() {
  const values = new URLSearchParams(), range = rangeNow(), step = stepNow(range);
  const edge = (date) => new Date(Math.floor(date / (step * 6e4)) * step * 6e4).toISOString().slice(0, 19);
  for (const { name, default: usual } of report().parameters) {
    if (name === "from") values.set("from", `${edge(range[0])}Z`);
    else if (name === "to") { if (view.get("range") === "custom") values.set("to", `${new Date(range[1]).toISOString().slice(0, 19)}Z`); }
    else if (name === "minutes") values.set("minutes", String(step));
    else { const text = view.get(`p-${name}`) || (name === "device_id" ? view.get("device") : "") || ""; if (text && text !== usual) values.set(name, text); }
  }
  return values;
}
function fill(id, options, value) {
  const box = at(id), now = JSON.stringify(options);
  if (box.dataset.options !== now) { box.dataset.options = now; box.replaceChildren(...options.map(([value, text]) => make("option", { value }, text))); }
  if (document.activeElement !== box) box.value = value;
}
function showControls() {
  const asked = report(), range = rangeNow(), step = STEPS.find((each) => (range[1] - range[0]) / 6e4 / each <= POINTS) || 10080;
  fill("report", reports.map((each) => [each.name, each.title]), asked.name);
  fill("device", [["", `All ${number(lake.devices.length)}`], ...lake.devices.slice(0, 1000).map((name) => [name, name])], view.get("device") || "");
  fill("bucket", [["", `Auto (${stepText(step)})`], ...STEPS.map((each) => [String(each), stepText(each)])], view.get("bucket") || "");
  at("refresh").value = view.get("refresh") || "0";
  for (const [id, name] of [["device-part", "device_id"], ["range-part", "from"], ["bucket-part", "minutes"]]) at(id).hidden = !has(name);
  show(at("ranges"), ...choose("range", RANGES, view.get("range") || "6h"));
  at("custom").hidden = view.get("range") !== "custom" || !has("from");
  const local = (date) => new Date(date - date.getTimezoneOffset() * 6e4).toISOString().slice(0, 16);
  range.forEach((date, i) => { const box = at(["from", "to"][i]); if (document.activeElement !== box && !Number.isNaN(+date)) box.value = local(date); });
  const own = asked.parameters.filter((each) => !["device_id", "from", "to", "minutes"].includes(each.name));
  show(at("parameters"), ...own.map((each) => make("div", { data: { key: each.name } }, make("label", { for: `p-${each.name}` }, each.name.replaceAll("_", " ")), make("input.field", { id: `p-${each.name}`, title: each.meaning, placeholder: each.default, type: { integer: "number", number: "number", date: "date" }[each.type] || "text", step: each.type === "number" ? "any" : null, value: view.get(`p-${each.name}`) || "" }))));
  show(at("about"), ...(asked.fault ? [sentence(asked.fault.message, asked.fault.hint)] : asked.description.split("`").map((text, i) => (i % 2 ? make("code", text) : text))));
}

// ---- the lake at a glance

async function showLake() {
  const [seen, schema, latest, days] = await Promise.all(["overview", "schema", "devices/latest", "rows-by-day"].map((path) => get(`analytics/${path}`)));
  const date = (text) => (text ? new Date(text) : null), newest = latest.data.reduce((best, row) => (!best || row.timestamp > best.timestamp ? row : best), null);
  lake = { rows: seen.total_rows, objects: schema.objects, warnings: schema.warnings, devices: latest.data.map((row) => row.device_id), first: date(seen.min_timestamp), last: date(seen.max_timestamp), days: days.data };
  const fresh = latest.data.filter((row) => Date.now() + skew - new Date(row.timestamp) < 6e5).length;
  const tile = (name, value, note) => make("div", { data: { key: name } }, make("dt", name), make("dd", value, make("span.note", note)));
  at("glance").hidden = at("ask").hidden = !lake.rows;
  show(at("tiles"), tile("Rows", number(seen.total_rows), `${plural(schema.objects, "object")}, ${size(schema.bytes)}`), tile("Devices", number(seen.device_count), fresh === seen.device_count ? "all seen in the last 10 min" : `${number(fresh)} seen in the last 10 min`),
    tile("First reading", lake.first ? make("time", { title: utc(lake.first) }, day(lake.first, true)) : "–", lake.first ? ago(seen.min_timestamp) : ""), tile("Latest reading", lake.last ? ago(seen.max_timestamp) : "–", lake.last ? `${stamp(lake.last)}${newest ? `, ${newest.device_id}` : ""}` : ""));
  at("lake").hidden = lake.days.length < 2;
  if (lake.days.length > 1) drawLake();
}
const dayStart = (text) => Date.parse(`${text}T00:00:00Z`);
function drawLake() {
  const first = dayStart(lake.days[0].date), count = Math.round((dayStart(lake.days.at(-1).date) - first) / 864e5) + 1, width = 1000 / count, most = Math.max(...lake.days.map((each) => each.row_count));
  const x = (date) => Math.max(0, Math.min(1000, ((date - first) / 864e5) * width)), bars = lake.days.map((each) => { const height = Math.max(1, (each.row_count / most) * 38); return make("rect", { x: x(dayStart(each.date)), width: width * 0.8, y: 40 - height, height }, make("title", `${each.date}: ${plural(each.row_count, "row")}`)); });
  const [from, to] = lakeDrag || rangeNow(), left = x(Math.min(from, to)), right = Math.max(x(Math.max(from, to)), left + 4);
  const box = at("span"), span_ = make("rect", { x: left, width: right - left, y: 0, height: 40, class: "sel" });
  box.setAttribute("aria-label", `Rows by day from ${lake.days[0].date} to ${lake.days.at(-1).date}; chosen: ${stamp(new Date(from))} to ${stamp(new Date(to))}`);
  box.dateAt = (px) => new Date(first + (px / box.clientWidth) * count * 864e5);
  box.replaceChildren(...bars, span_, make("rect", { x: right - 2, width: 2, y: 0, height: 40, class: "edge" }));
  const marks = Array.from({ length: 5 }, (_, i) => { const mark_ = make("span", day(new Date(first + (i / 5) * count * 864e5))); mark_.style.left = `${i * 20}%`; return mark_; });
  show(at("span-axis"), ...marks);
}
let lakeDrag = null;
const lakeAt = (event) => at("span").dateAt(event.clientX - at("span").getBoundingClientRect().left);
at("span").addEventListener("pointerdown", (event) => { at("span").setPointerCapture(event.pointerId); lakeDrag = [lakeAt(event), lakeAt(event)]; });
at("span").addEventListener("pointermove", (event) => { if (lakeDrag) { lakeDrag[1] = lakeAt(event); drawLake(); } });
at("span").addEventListener("pointerup", () => { const [a, b] = (lakeDrag || []).map(Number).sort((x, y) => x - y); lakeDrag = null; if (b - a > 36e5) chooseSpan(new Date(a), new Date(b)); });
function chooseSpan(from, to) { zoom = null; keep({ range: "custom", from: from.toISOString(), to: to.toISOString() }); return turn(); }

// ---- asking

const kindOf = (type) => (/^TIMESTAMP/.test(type) ? "instant" : type === "DATE" ? "date" : /INT|DOUBLE|FLOAT|DECIMAL|REAL/.test(type) ? "number" : "text");
const base = (name) => name.replace(/^(avg|max|min)_/, "");
const title = (name) => { const words = name.replace(/^(avg|max|min)_/, (_, how) => ({ avg: "average ", max: "highest ", min: "lowest " })[how]).replaceAll("_", " "), unit = UNITS[base(name)]; return `${words[0].toUpperCase()}${words.slice(1)}${unit ? `, ${unit}` : ""}`; };
const short = (name) => ({ row_count: "Rows" })[name] || `${base(name)[0].toUpperCase()}${base(name).slice(1).replaceAll("_", " ")}`;
const timeOf = (asked) => asked.columns.find((each) => ["time", "date"].includes(each.name))?.name;
async function showReport() {
  const asked = report(), values = query(), path = asked.path.slice(1), mine = ++askedAt;
  const busy = setTimeout(() => { at("fresh").textContent = "Loading"; for (const part of [at("view"), at("rows-part")]) { part.classList.add("skeleton"); part.setAttribute("aria-busy", "true"); } }, 400);
  try {
    const data = await get(path, { ...Object.fromEntries(values), format: "json" });
    if (mine !== askedAt) return;
    const list = Object.entries(data).find(([name, value]) => Array.isArray(value) && name !== "warnings"), rows = list ? list[1] : [Object.fromEntries(Object.entries(data).filter(([name]) => name !== "warnings"))];
    shown = { asked, rows, values };
    const took = /dur=([\d.]+)/.exec(data.headers.get("Server-Timing") || ""), as = data.headers.get("X-Data-As-Of");
    show(at("fresh"), as ? `As of ${clock(new Date(as), true)}${took ? `, took ${number(Number(took[1]), 0)} ms` : ""}` : "");
    for (const format of ["csv", "parquet", "xlsx"]) at(`as-${format}`).href = `${ROOT}${path}?${new URLSearchParams([...values, ["format", format]])}`;
    showWarnings(data.warnings || []);
    tell();
    showRows();
    showChart();
  } catch (error) {
    if (error instanceof TypeError || error.status === 401) throw error;
    if (mine === askedAt) refused(error);
  } finally {
    clearTimeout(busy);
    for (const part of [at("view"), at("rows-part")]) { part.classList.remove("skeleton"); part.removeAttribute("aria-busy"); }
  }
}
const box = (kind, mark_, ...parts) => make("div", { class: `notice ${kind}` }, mark(mark_), make("div", ...parts));
const link = (text, data) => press(".bare.lined", data, text);
function tell() {
  const { rows } = shown, range = RANGES.find(([key]) => key === (view.get("range") || "6h"))[1];
  if (rows.length) { show(at("state")); return; }
  const last = lake.last, words = view.get("range") === "custom" ? "in this range" : `in the last ${range}`;
  show(at("state"), box("", "off", make("strong", has("from") ? `No readings ${words}.` : "No rows."), last && has("from") ? [" The latest reading is from ", when(last.toISOString()), ". ", link(`Show the ${range === "Custom" ? "6 h" : range} before it`, { act: "showLatest" })] : ""));
}
function refused(error) {
  at("view").hidden = at("rows-part").hidden = true;
  const [from, to] = rangeNow();
  show(at("state"), box("bad", "bad", make("strong", `The report was refused: ${from > to ? "'From' must be earlier than 'To'." : said(error)}`), " ", from > to ? link("Swap them", { act: "swap" }) : link("Try again", { act: "again" })));
}
function showWarnings(warnings) {
  const objects = new Map();
  for (const { object, message } of warnings) objects.set(object, [...(objects.get(object) || []), message]);
  const named = [...objects].filter(([object]) => object), others = objects.get("") || [];
  const items = [...named.map(([object, messages]) => make("li", make("code", object), `: ${messages.map((each) => each.replace(object, "").replace(/^[:\s]+/, "")).join("; ")}`)), ...others.map((each) => make("li", sentence(each)))];
  const head = named.length ? `${number(named.length)} of ${plural(Math.max(lake.objects, named.length), "object")} could not be read whole, so that rows of ${named.length === 1 ? "it" : "them"} may be left out.` : "These answers may be old.";
  show(at("warnings"), ...(warnings.length ? [box("warn", "warn", make("strong", head), make("ul", ...items), make("span.next", make("b", "Next: "), "verify their windows on the ", make("a", { href: `${ROOT}#delivery` }, "delivery map"), "; heal writes them again."))] : []));
}

// ---- the rows

function cellText(value, kind, name) {
  if (value === null || value === undefined) return "–";
  if (kind === "instant") { const date = new Date(value); return make("time", { datetime: value, title: utc(date) }, `${day(date)} ${clock(date, date.getSeconds() > 0)}`); }
  if (kind === "number") return /INT/.test(shown.asked.columns.find((each) => each.name === name).type) ? number(value) : value.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
function showRows() {
  const { asked, rows } = shown, columns = asked.columns.map((each) => [each.name, kindOf(each.type)]);
  at("rows-part").hidden = !rows.length;
  at("row-count").textContent = `${rows.length > rowsShown ? `First ${number(rowsShown)} of ${number(rows.length)}` : plural(rows.length, "row")}. Times are local.`;
  at("download").textContent = `Download all ${number(rows.length)}:`;
  show(at("rows-head"), make("tr", ...columns.map(([name, kind]) => make("th", { class: kind === "number" ? "number" : null }, name === "device_id" ? "Device" : title(name)))));
  show(at("rows"), ...rows.slice(0, rowsShown).map((row) => make("tr", ...columns.map(([name, kind]) => make("td", { class: kind === "number" ? "number" : null, "data-label": name === "device_id" ? null : short(name).toLowerCase() }, cellText(row[name], kind, name))))));
  at("more").hidden = rows.length <= rowsShown;
}

// ---- the chart

let data = null; // {names, times, lines: name -> values, measure, unit}
const valueText = (value) => (value === null || value === undefined ? "no data" : `${number(value, 1)}${data.unit ? ` ${data.unit}` : ""}`);
const timeText = (ms) => (data.daily ? day(new Date(ms)) : stamp(new Date(ms), false));
function showChart() {
  const { asked, rows } = shown, numbers = asked.columns.filter((each) => kindOf(each.type) === "number").map((each) => each.name).filter((name) => rows.some((row) => typeof row[name] === "number"));
  const time = timeOf(asked), by = asked.columns.some((each) => each.name === "device_id");
  at("view").hidden = !rows.length || !numbers.length || !(time || by);
  if (at("view").hidden) return;
  const measure = numbers.includes(view.get("measure")) ? view.get("measure") : numbers[0];
  show(at("measures"), ...choose("measure", numbers.map((name) => [name, short(name)]), measure));
  at("chart-title").textContent = title(measure) + (measure === "row_count" && time ? " in each bucket" : "");
  const all = by ? [...new Set(rows.map((row) => row.device_id))] : ["all"], names = time ? all.slice(0, LINES) : all, axis = time ? [...new Set(rows.map((row) => row[time]))].sort() : all;
  const place = new Map(axis.map((each, i) => [each, i])), lines = new Map(names.map((name) => [name, new Array(axis.length).fill(null)]));
  for (const row of rows) lines.get(by ? row.device_id : "all")?.splice(place.get(time ? row[time] : row.device_id), 1, row[measure]);
  data = { names, lines, measure, unit: UNITS[base(measure)] || (/count|records/.test(measure) ? "rows" : ""), times: time ? axis.map((each) => (time === "date" ? dayStart(each) : Date.parse(each))) : null, labels: axis, daily: time === "date", left: all.length - names.length };
  if (data.times && data.times.length > 1) fillGaps();
  if (zoom && zoom[1] >= axisLength()) zoom = null;
  show(at("series"), ...(time && by ? names.map((name, s) => make("button", { type: "button", "aria-pressed": String(!hiddenSeries.has(name)), title: "Click hides, Alt+click shows only this", data: { act: "series", name } }, key(s), name)) : []), data.left > 0 && time ? make("span.quiet", `${plural(data.left, "more device")}: choose one above`) : null);
  draw();
}
function fillGaps() { // a bucket without rows is a gap in the line, not a longer step
  const steps = data.times.slice(1).map((each, i) => each - data.times[i]), step = Math.min(...steps), count = Math.round((data.times.at(-1) - data.times[0]) / step) + 1;
  if (count === data.times.length || count > 4000) return;
  const times = Array.from({ length: count }, (_, i) => data.times[0] + i * step), at_ = data.times.map((each) => Math.round((each - data.times[0]) / step));
  for (const [name, values] of data.lines) { const wide = new Array(count).fill(null); values.forEach((value, i) => { wide[at_[i]] = value; }); data.lines.set(name, wide); }
  data.times = times;
}
const axisLength = () => (data.times || data.labels).length;
const key = (s) => make("svg.key", { viewBox: "0 0 20 8", "aria-hidden": "true" }, make("line", { x1: 0, x2: 20, y1: 4, y2: 4, class: `s${s + 1}` }));
const visible = () => data.names.map((name, s) => [name, s]).filter(([name]) => !hiddenSeries.has(name));
const window_ = () => zoom || [0, axisLength() - 1];
function scale(values) {
  const low = Math.min(...values), high = Math.max(...values), raw = (high - low || Math.abs(high) || 1) / 5, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw);
  return [Math.floor(low / step) * step, Math.ceil(high / step) * step || step, step];
}
function draw() {
  const plot = at("plot"), w = plot.clientWidth, h = plot.clientHeight, [from, to] = window_(), left = 48, right = w - 48, top = 8, bottom = h - 24;
  const shownLines = visible(), values = shownLines.flatMap(([name]) => data.lines.get(name).slice(from, to + 1)).filter((value) => typeof value === "number");
  const bars_ = !data.times, [low, high, step] = scale(values.length ? (bars_ ? [...values, 0] : values) : [0, 1]);
  const x = (i) => left + ((i - from + (bars_ ? 0.5 : 0)) / Math.max(bars_ ? to - from + 1 : to - from, 1)) * (right - left), y = (value) => bottom - ((value - low) / (high - low || 1)) * (bottom - top), parts = [];
  for (let v = low; v <= high + step / 2; v += step) parts.push(make("line", { x1: left, x2: right, y1: y(v), y2: y(v), class: "grid" }), make("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, number(v, step < 1 ? 2 : 0)));
  for (const i of ticks(from, to, w < 500 ? 4 : 8)) parts.push(make("text", { x: x(i), y: h - 4, "text-anchor": "middle" }, bars_ ? data.labels[i].slice(0, 12) : tickText(data.times[i], data.times[to] - data.times[from])));
  const ends = [];
  for (const [name, s] of shownLines) {
    const line = data.lines.get(name);
    if (bars_) { const i = data.labels.indexOf(name), value = line[i]; if (typeof value === "number") parts.push(make("rect", { x: x(i) - (right - left) / (to - from + 1) / 3, width: Math.max(1, ((right - left) / (to - from + 1)) * 0.66), y: Math.min(y(value), y(0)), height: Math.abs(y(value) - y(0)), class: "column" })); continue; }
    let d = "", pen = "M", last = null;
    for (let i = from; i <= to; i += 1) { const v = line[i]; if (typeof v !== "number") { pen = "M"; continue; } d += `${pen}${x(i).toFixed(1)} ${y(v).toFixed(1)}${pen === "M" && typeof line[i + 1] !== "number" ? "h.1" : ""}`; pen = "L"; last = v; }
    parts.push(make("path", { d, class: `s${s + 1}` }));
    if (last !== null) ends.push([y(last), name]);
  }
  ends.sort((a, b) => a[0] - b[0]).forEach((end, i) => { if (i && end[0] < ends[i - 1][0] + 13) end[0] = ends[i - 1][0] + 13; });
  ends.forEach(([place, name]) => parts.push(make("text", { x: right + 6, y: place + 4 }, name.length > 7 ? `${name.slice(0, 6)}…` : name)));
  if (drag) parts.push(make("rect", { x: Math.min(x(drag[0]), x(drag[1])), width: Math.abs(x(drag[1]) - x(drag[0])), y: top, height: bottom - top, class: "zoom" }));
  if (cross !== null && cross <= to) parts.push(make("line", { x1: x(cross), x2: x(cross), y1: top, y2: bottom, class: "cross" }));
  plot.setAttribute("viewBox", `0 0 ${w} ${h}`);
  plot.setAttribute("aria-label", `${at("chart-title").textContent} by device. Left and right arrows read the values; the table below has the same rows.`);
  plot.replaceChildren(...parts);
  plot.indexAt = (px) => Math.max(from, Math.min(to, Math.round(from + ((px - left) / (right - left)) * (to - from))));
  at("unzoom").hidden = !zoom;
  at("hint-text").textContent = bars_ ? "" : zoom ? `Zoomed to ${timeText(data.times[from])} to ${timeText(data.times[to])}. Esc goes back.` : "Drag over the chart to zoom in.";
  tip(cross === null ? 0 : x(cross), w);
}
function ticks(from, to, most) { // round times where there are times
  const all = Array.from({ length: to - from + 1 }, (_, i) => from + i), every = Math.ceil(all.length / most);
  if (!data.times || data.daily) return all.filter((_, i) => i % every === every >> 1);
  const local = (i) => data.times[i] - new Date(data.times[i]).getTimezoneOffset() * 6e4, long = data.times[to] - data.times[from];
  const step = [5, 10, 15, 30, 60, 120, 180, 360, 720, 1440, 2880, 10080, 20160].map((minutes) => minutes * 6e4).find((each) => long / each <= most) || 4032e6;
  const found = all.filter((i) => local(i) % step === 0);
  return found.length ? found : all.filter((_, i) => i % every === every >> 1);
}
const tickText = (ms, long) => { const date = new Date(ms); return data.daily || long > 2592e5 || clock(date) === "00:00" ? day(date) : clock(date); };
const label = (i) => (data.times ? timeText(data.times[i]) : data.labels[i]);
function tip(px, w) {
  const box_ = at("tip");
  box_.hidden = cross === null;
  if (box_.hidden) return;
  const rows = (data.times ? visible() : [[data.labels[cross], 0]]).map(([name, s]) => [name, s, data.lines.get(name)?.[cross]]).sort((a, b) => (b[2] ?? -Infinity) - (a[2] ?? -Infinity));
  box_.replaceChildren(make("b", label(cross)), make("table", make("tbody", ...rows.map(([name, s, value]) => make("tr", make("td", data.times ? key(s) : ""), make("td", name), make("td.number", valueText(value)))))));
  box_.style.left = px > w / 2 ? "auto" : `${px + 12}px`;
  box_.style.right = px > w / 2 ? `${w - px + 12}px` : "auto";
}
function zoomTo(from, to) { zoom = from === 0 && to === axisLength() - 1 ? null : [from, to]; cross = null; draw(); }
const plot = at("plot"), place_ = (event) => plot.indexAt(event.clientX - plot.getBoundingClientRect().left);
plot.addEventListener("pointermove", (event) => { cross = place_(event); if (drag) drag[1] = cross; draw(); });
plot.addEventListener("pointerleave", () => { cross = null; draw(); });
plot.addEventListener("pointerdown", (event) => { if (!data.times) return; plot.setPointerCapture(event.pointerId); drag = [place_(event), place_(event)]; });
plot.addEventListener("pointerup", () => { const [a, b] = (drag || [0, 0]).sort((x, y) => x - y); drag = null; if (b - a > 1) zoomTo(a, b); else draw(); });
plot.addEventListener("dblclick", () => zoomTo(0, axisLength() - 1));
plot.addEventListener("keydown", (event) => {
  const [from, to] = window_(), here = cross ?? to, next = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: from, End: to }[event.key];
  if (next !== undefined) { event.preventDefault(); cross = Math.max(from, Math.min(to, next)); draw(); at("read").textContent = `${label(cross)}: ${(data.times ? visible() : [[data.labels[cross]]]).map(([name]) => `${name} ${valueText(data.lines.get(name)?.[cross])}`).join(", ")}`; }
  if (data.times && (event.key === "+" || event.key === "-")) { const mid = cross ?? Math.round((from + to) / 2), half = Math.max(1, Math.round((to - from) / (event.key === "+" ? 4 : 1))); zoomTo(Math.max(0, mid - half), Math.min(axisLength() - 1, mid + half)); }
  if (event.key === "Escape") zoomTo(0, axisLength() - 1);
});
addEventListener("resize", () => { if (data && !at("view").hidden) draw(); if (lake && !at("lake").hidden) drawLake(); });

// ---- acts

const redo = (values) => { zoom = null; rowsShown = FIRST_ROWS; keep(values); return turn(); };
Object.assign(ACTS, {
  range({ dataset }) { const [from, to] = rangeNow(); return redo(dataset.range === "custom" ? { range: "custom", from: from.toISOString(), to: to.toISOString() } : { range: dataset.range === "6h" ? "" : dataset.range, from: "", to: "" }); },
  measure({ dataset }) { keep({ measure: dataset.measure }); showChart(); },
  unzoom: () => zoomTo(0, axisLength() - 1),
  moreRows() { rowsShown += 100; showRows(); },
  again: () => turn(),
  swap: () => redo({ from: view.get("to"), to: view.get("from") }),
  showLatest() { const known = RANGES.find(([name]) => name === (view.get("range") || "6h")), to = new Date(lake.last.getTime() + 1000); return chooseSpan(new Date(to - (known[2] || 216e5)), to); },
  async copyLink(button) { let copied = true; try { await navigator.clipboard.writeText(location.href); } catch { copied = false; } notice("ok", copied ? "Copied. The link holds the report, devices, range, bucket and measure." : make("span", "Copy this address: ", make("code", location.href)), button); },
});
at("series").addEventListener("click", (event) => {
  const { name } = event.target.closest("button")?.dataset || {};
  if (!name) return;
  if (event.altKey) data.names.forEach((each) => (each === name ? hiddenSeries.delete(each) : hiddenSeries.add(each)));
  else if (hiddenSeries.has(name)) hiddenSeries.delete(name); else if (visible().length > 1) hiddenSeries.add(name);
  keep({ hide: [...hiddenSeries].join("\n") });
  showChart();
});
at("ask").addEventListener("submit", (event) => event.preventDefault());
at("ask").addEventListener("change", ({ target }) => {
  if (target.id === "refresh") { keep({ refresh: target.value === "0" ? "" : target.value }); page.every = Number(target.value); return turn(); }
  if (target.id === "report") return redo({ report: target.value === "over_time" ? "" : target.value, measure: "" });
  if (target.id === "from" || target.id === "to") return target.value ? redo({ range: "custom", [target.id]: new Date(target.value).toISOString() }) : null;
  return redo({ [target.id]: target.value });
});
function emptyLake() {
  at("view").hidden = at("rows-part").hidden = at("copy-link").hidden = true;
  const [head, rest] = lake.objects ? ["No row can be read.", ` There ${lake.objects === 1 ? "is" : "are"} ${plural(lake.objects, "object")}, and none of them holds a row that can be read. `] : ["The lake is empty.", " Nothing has been delivered yet; the first rows appear after the first run of a pipeline. "];
  show(at("state"), box("", "off", make("strong", head), rest, make("a", { href: `${ROOT}.` }, "Open the overview")));
  showWarnings(lake.warnings);
}
begin({
  scope: "analytics:read", other: ["", "Open the overview"], every: Number(view.get("refresh")) || 0,
  async refresh() {
    if (!reports.length) ({ reports } = await get("analytics"));
    try { await showLake(); } catch (error) { if (error instanceof TypeError || error.status === 401) throw error; lake = lake || { devices: [], days: [], objects: 0, rows: 1 }; refused(error); return; }
    if (!lake.rows) { emptyLake(); return; }
    at("copy-link").hidden = false;
    showControls();
    await showReport();
    page.every = Number(view.get("refresh")) || 0;
  },
});
