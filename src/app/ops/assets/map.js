"use strict";
// The delivery map: each row is one string of the API, one letter a cell. A cell opens into finer ones, at last into windows.
const KIND = {
  k: ["ok", "OK"], n: ["none", "no data"], o: ["open", "still filling"], l: ["late", "late: not read yet"], s: ["aside", "rows set aside"],
  c: ["changed", "changed at the destination"], p: ["partial", "partly missing"], m: ["missing", "missing"], u: ["unknown", "not known"],
};
const PROBLEM = new Set([..."mpcsl"]);
const ABOUT = { 3600: "an hour", 14400: "4 hours", 43200: "12 hours", 86400: "a day", 604800: "a week", 2419200: "4 weeks" };
const LONG = { "24h": "24 h", "7d": "7 days", "30d": "30 days", "365d": "365 days" };
const SECONDS = { "24h": 86400, "7d": 604800, "30d": 2592000, "365d": 31536000 };
const SIGNS = { "=": "equal", "-": "missing", "+": "only at the destination", "*": "different", "!": "not compared" };
const MAPS_EVERY = 20000, A_PAGE = 20;
const counted = (text) => [..."mpcslonku"].map((letter) => [[...text].filter((each) => each === letter).length, KIND[letter][1]]).filter(([count]) => count).map(([count, word]) => `${count} ${word}`).join(", ");
const narrow = () => innerWidth <= 840;
const rangeNow = () => (SECONDS[view.get("range")] ? view.get("range") : "24h");
let asked = false, maps = {}, mapsKey = "", mapsAt = 0, pages = {}, opened = new Map(), drilled = null, working = null;

// ---- asking

async function loadMap(job) {
  const range = rangeNow(), cells = narrow() ? { "7d": 14, "365d": 13 }[range] : "";
  const query = { job, span: range, cells, tz: ZONE, problems: at("only").checked, find: at("find").value.trim(), offset: (pages[job] || 0) * A_PAGE, limit: 200 };
  try {
    const found = await get("ops/map", query);
    for (const [first, group] of opened) if (group.job === job) group.rows = (await get("ops/map", { ...query, problems: "", offset: 0, first, last: group.last })).rows;
    return found;
  } catch (error) {
    if (error instanceof TypeError) throw error;
    return { error: said(error) };
  }
}
async function showMaps(now = false) {
  const jobs = summary.jobs.filter((job) => job.has_map), key = [rangeNow(), at("only").checked, at("find").value, JSON.stringify(pages), [...opened.keys()], narrow()].join("|");
  const busy = [...proofs.verifications, ...proofs.heals].some((each) => !each.ended_at);
  if (now || busy || key !== mapsKey || Date.now() - mapsAt > MAPS_EVERY) {
    const found = await Promise.all(jobs.map(async (job) => [job.name, await loadMap(job.name)]));
    [maps, mapsKey, mapsAt] = [Object.fromEntries(found), key, Date.now()];
  }
  // On a phone groups are long: at first those with problems only.
  if (narrow() && !asked && !view.has("problems") && Object.values(maps).some((each) => each.groups?.length && each.problems)) { asked = at("only").checked = true; await showMaps(true); return; }
  asked = true;
  at("delivery").hidden = !jobs.length;
  page.every = busy ? 1000 : 5000;
  drawMaps(jobs);
  tellWork();
}

// ---- drawing

function drawMaps(jobs) {
  const present = new Set();
  show(at("ranges"), ...choose("range", Object.entries(LONG), rangeNow()));
  show(at("maps"), ...jobs.map((job) => mapOf(job, maps[job.name] || {}, present)));
  show(at("legend"), ...[..."kolnmpcsu"].filter((letter) => present.has(letter)).map((letter) => make("li", { data: { key: letter } }, make("span", { class: `cell ${KIND[letter][0]}`, "aria-hidden": "true" }), KIND[letter][1])));
  const first = Object.values(maps).find((each) => each.cell_seconds), recorded = Object.values(maps).some((each) => each.source === "records");
  show(at("map-about"), first ? `Each cell is ${ABOUT[first.cell_seconds]}; the worst state in it wins. Times are local. Choose a cell to see its windows.` : "", recorded ? " Where there are many windows, what the last full check found is shown; an opened cell is listed anew." : "", make("span.keys-hint", " Keys: arrows move, Enter opens, N goes to the next problem."));
  for (const grid of at("maps").querySelectorAll("[role=grid]")) if (!grid.querySelector(".cell[tabindex='0']")) { const cell = [...grid.querySelectorAll(".cell")].find((each) => each.dataset.bad) || grid.querySelector(".cell"); if (cell) cell.tabIndex = 0; }
}
function mapOf(job, data, present) {
  const head = make("div.head", make("h3", job.name), make("span.quiet.small", ...checked(job.name)), job.can_verify ? press(".bare.lined.push", { act: "verifyRange", job: job.name, key: "verify", needs: "ops:run" }, `Verify ${LONG[rangeNow()]}`) : null);
  const result = running(job.name), parts = [head, result ? make("progress", { max: result.total || null, value: result.total ? result.done : null, "aria-label": `${job.name}: windows compared` }) : null];
  if (data.error) parts.push(make("p.text-bad", data.error));
  else if (data.starts) {
    const rows = data.groups.length ? data.groups.flatMap((group) => [groupRow(job, group, data), ...(opened.get(group.first)?.rows || []).map((row) => oneRow(job, row, data))]) : data.rows.map((row) => oneRow(job, row, data));
    for (const row of [...data.groups, ...data.rows]) for (const letter of row.cells) present.add(letter);
    parts.push(axis(data));
    parts.push(rows.length ? make("div", { role: "grid", "aria-label": `${job.name}, last ${LONG[rangeNow()]}`, "aria-readonly": "true", data: { key: "grid" } }, ...rows) : make("p.quiet", at("only").checked ? "No problems in this range." : at("find").value ? `No partition matches “${at("find").value}”.` : "No partition yet: they appear with the first run that finds data."));
    if (data.rows_total > (data.groups.length || data.rows.length)) parts.push(pager(job, data));
  }
  return make("article.map", { id: `map-${job.name}`, data: { key: job.name } }, ...parts);
}
function pager(job, data) {
  const here = pages[job.name] || 0, size = data.groups.length ? A_PAGE : 200, from = here * A_PAGE + 1, shown = data.groups.length || data.rows.length;
  const go = (by, word, off) => Object.assign(press("", { act: "mapPage", job: job.name, to: here + by }, word), { disabled: off });
  return make("div.pager", { data: { key: "pager" } }, go(-size / A_PAGE, "Previous", here === 0), go(size / A_PAGE, "Next", from - 1 + shown >= data.rows_total), make("span.quiet", `${data.groups.length ? "Groups" : "Partitions"} ${number(from)} to ${number(from - 1 + shown)} of ${number(data.rows_total)}. ${number(data.problems)} of ${number(data.total)} partitions have problems.`));
}
function cellWhen(from, to) {
  const [a, b] = [new Date(from), new Date(to)], hours = (b - a) / 36e5;
  if (hours > 200) return `4 weeks from ${weekday(a)}`;
  if (hours > 30) return `week of ${weekday(a)}`;
  return hours > 20 ? weekday(a) : `${weekday(a)} ${clock(a)} to ${clock(b)}`;
}
const endOf = (data, i) => data.starts[i + 1] || data.end;
function drawCell(letter, from, to, name, attributes, data) {
  const future = new Date(from) > Date.now() + skew, title = `${name}${cellWhen(from, to)}: ${future ? "not yet" : KIND[letter][1]}`;
  return make("button.cell", { class: future ? null : KIND[letter][0], type: "button", title, "aria-label": title, disabled: future && !attributes.role, data: { bad: PROBLEM.has(letter) ? "1" : null, ...data }, ...attributes });
}
function cellsOf(name, text, data) {
  const cells = [...text].map((letter, i) => drawCell(letter, data.starts[i], endOf(data, i), `${name}, `, { role: "gridcell", tabindex: "-1" }, { i }));
  return make("div.cells", { role: "presentation", cells: text.length }, ...cells);
}
function oneRow(job, row, data) {
  const lag = row.error ? make("span.text-bad", { title: row.error }, "not listed") : row.lag_seconds === null ? "" : row.lag_seconds < 0 ? "ahead" : span(row.lag_seconds);
  return make("div.map-row", { role: "row", data: { key: row.name, job: job.name, name: row.name } }, make("span.label", { role: "rowheader" }, make("span", { title: row.name }, row.name)), cellsOf(row.name, row.cells, data), make("span.lag", { role: "gridcell" }, lag));
}
function groupRow(job, group, data) {
  const name = `${group.first} to ${group.last}`, toggle = make("button", { type: "button", "aria-expanded": String(opened.has(group.first)), data: { act: "group", job: job.name, first: group.first, last: group.last } }, name);
  return make("div.map-row.group", { role: "row", data: { key: `group ${group.first}`, job: job.name } }, make("span.label", { role: "rowheader" }, toggle), cellsOf(name, group.cells, data), make("span.lag", { role: "gridcell" }, make("span", { class: group.problems ? "text-bad" : null }, `${number(group.problems)} of ${number(group.count)}`)));
}
function axis(data) {
  const cells = data.starts.length, every = { 3600: narrow() ? 6 : 3, 14400: 6, 43200: 4, 86400: narrow() ? 10 : 5, 604800: 8, 2419200: 4 }[data.cell_seconds] || 6, line = make("div.axis");
  for (let i = 0; i < cells - every / 2; i += every) {
    const date = new Date(data.starts[i]), text = data.cell_seconds === 3600 ? (i === 0 || date.getHours() < every ? `${day(date)} ${clock(date)}` : clock(date)) : day(date), tick = make("span", text);
    tick.style.left = `${(i / cells) * 100}%`;
    line.append(tick);
  }
  line.append(make("span.end", "now"));
  return make("div.map-row.scale", { "aria-hidden": "true", data: { key: `axis ${data.starts[0]} ${cells}` } }, make("span.label"), line, make("span.lag", data.groups.length ? "Problems in" : "Lag"));
}

// ---- verifying and healing: how far it is, and a result that stays

const running = (job) => [...proofs.heals, ...proofs.verifications].find((each) => each.job === job && !each.ended_at);
const signs = (counts) => Object.entries(counts).sort().map(([sign, count]) => `${number(count)} ${SIGNS[sign]}`).join(", ");
function checked(job) {
  const now = running(job), last = proofs.verifications.find((each) => each.job === job), healed = proofs.heals.find((each) => each.job === job);
  if (now) return [`${proofs.heals.includes(now) ? "Healing" : "Verifying"}: ${number(now.done)}${now.total ? ` of ${number(now.total)}` : ""} windows compared`];
  const parts = !last ? ["Not checked yet."] : last.error ? [make("span.text-bad", `The check was interrupted: ${sentence(last.error, last.hint)}`)] : [ago(last.ended_at, "Checked "), last.equal ? `: all ${number(last.done)} equal.` : last.done ? `: ${signs(last.counts)}.` : ": no window has ended yet."];
  return healed && healed.ended_at ? [...parts, " ", ...healText(healed)] : parts;
}
function healText(heal) {
  if (heal.error) return [make("span.text-bad", `Healing was interrupted: ${sentence(heal.error, heal.hint)}`)];
  const left = heal.windows.length;
  return ["Healed at ", when(heal.ended_at, false), `: ${plural(heal.healed, "window")} written again; `, left ? `${plural(left, "window")} still differ${left === 1 ? "s" : ""}: ${heal.windows[0].error || SIGNS[heal.windows[0].sign]}.` : "both ends are equal now."];
}
async function startHeal(job, part, beside) {
  await post(job, "heal", part);
  working = { job, since: Date.now() + skew };
  notice("run", make("span", { id: "work" }, `Healing ${part.partition || job}…`), beside);
  page.every = 1000;
  await turn();
}
async function startVerify(job, seconds, beside) {
  const to = new Date(Date.now() + skew);
  await post(job, "verify", { from: new Date(to - seconds * 1000).toISOString(), to: to.toISOString() });
  beside?.closest(".map")?.querySelector("h3").focus();
  page.every = 1000;
  await turn();
}
function tellWork() {
  const heal = working && proofs.heals.find((each) => each.job === working.job);
  if (!heal || !at("work")) return;
  if (!heal.ended_at) { at("work").textContent = `Healing: ${number(heal.done)} windows compared, ${number(heal.healed)} written again`; return; }
  working = null;
  at("work").replaceChildren(...healText(heal));
  at("work").removeAttribute("id");
  at("notice").className = `notice ${heal.error || heal.windows.length ? "bad" : "ok"}`;
  at("notice").querySelector(".mark").className = `mark ${heal.error || heal.windows.length ? "bad" : "ok"}`;
  if (drilled) drill(drilled.path);
}
Object.assign(ACTS, {
  range({ dataset }) { keep({ range: dataset.range === "24h" ? "" : dataset.range }); closeDrill(false); return showMaps(true); },
  mapPage(button) { pages[button.dataset.job] = Math.max(Number(button.dataset.to), 0); return showMaps(true); },
  group({ dataset }) { if (opened.has(dataset.first)) opened.delete(dataset.first); else opened.set(dataset.first, { job: dataset.job, last: dataset.last, rows: [] }); return showMaps(true); },
  verifyRange(button) {
    const { job } = button.dataset, range = rangeNow(), data = maps[job] || {};
    if (SECONDS[range] < 2592000) return startVerify(job, SECONDS[range], button);
    notice("warn", make("span", `Verifying ${LONG[range]} reads every window of ${plural(data.total || 0, "partition")} at both ends, which may take long. `, press("", { act: "verifySure", job, seconds: SECONDS[range] }, "Verify all the same")), button);
    return null;
  },
  async verifySure({ dataset }) { at("notice").hidden = true; await startVerify(dataset.job, Number(dataset.seconds)); },
});

// ---- an opened cell

const rowOf = (cell) => cell.closest(".map-row");
function openCell(cell) {
  const row = rowOf(cell), data = maps[row.dataset.job], i = Number(cell.dataset.i);
  if (row.classList.contains("group")) { row.querySelector(".label button").click(); return; }
  if (drilled && drilled.cell === cell) { closeDrill(true); return; }
  closeDrill(false);
  drilled = { cell, job: row.dataset.job, name: row.dataset.name, box: make("div.drill", { role: "gridcell" }) };
  cell.setAttribute("aria-selected", "true");
  row.after(make("div", { role: "row", class: "drill-row", "data-extra": "" }, drilled.box));
  drill([{ from: data.starts[i], to: endOf(data, i), letter: data.groups.length ? "" : letterAt(cell) }], true);
}
const letterAt = (cell) => Object.keys(KIND).find((letter) => cell.classList.contains(KIND[letter][0])) || "n";
function closeDrill(focus) {
  if (!drilled) return;
  if (drilled.box.contains(at("notice"))) { at("maps").before(at("notice")); }
  drilled.box.parentNode.remove();
  drilled.cell.removeAttribute("aria-selected");
  if (focus) drilled.cell.focus();
  drilled = null;
}
async function drill(path, focus) {
  const mine = drilled, place = path.at(-1), { job, name, box } = mine;
  const seconds = (new Date(place.to) - new Date(place.from)) / 1000;
  let finer = [];
  mine.path = path;
  try {
    if (!place.window && seconds > 5400) {
      const found = await get("ops/map", { job, first: name, last: name, from: place.from, to: place.to, tz: ZONE }), row = found.rows[0];
      finer = row ? [...row.cells].map((letter, i) => ({ from: found.starts[i], to: endOf(found, i), letter })) : [];
    } else if (!place.window) {
      const { windows } = await get("ops/map/windows", { job, partition: name, from: place.from, to: place.to });
      finer = windows.map((window) => ({ from: window.from, to: window.to, letter: window.letter, window }));
    }
  } catch (error) { if (error instanceof TypeError) throw error; box.replaceChildren(make("p.text-bad", said(error)), press("", { act: "closeDrill" }, "Close")); return; }
  if (drilled !== mine) return;
  if (finer.length === 1 && finer[0].window) [place.window, place.letter, finer] = [finer[0].window, finer[0].letter, []];
  drawDrill(path, finer);
  if (focus) ([...box.querySelectorAll(".cells .cell")].find((each) => each.dataset.bad) || box.querySelector(".cells .cell:not(:disabled)") || box.querySelector("button")).focus();
}
function drawDrill(path, finer) {
  const { box, name } = drilled, place = path.at(-1), held = at("notice");
  drilled.finer = finer;
  const crumbs = make("ol.crumbs.small", make("li", name), ...path.map((each, i) => make("li", i < path.length - 1 ? press(".bare", { act: "drillTo", to: i }, cellWhen(each.from, each.to)) : cellWhen(each.from, each.to))));
  const acts = [["Earlier", "drillMove", -1], ["Later", "drillMove", 1], ["Close", "closeDrill", 0]].map(([word, act, by]) => press(".bare.lined", { act, by }, word));
  const cells = finer.map((each, i) => {
    const date = new Date(each.from);
    return make("div", make("div.when", new Date(each.to) - date > 7e7 ? day(date) : clock(date)), drawCell(each.letter, each.from, each.to, "", {}, { act: "drillInto", i }));
  });
  const bad = finer.filter((each) => PROBLEM.has(each.letter)), fault = "mpc".includes(place.letter || " ") || bad.some((each) => "mpc".includes(each.letter));
  const part = JSON.stringify({ from: place.from, to: place.to, partition: name }), what = bad.length && finer[0].window ? plural(bad.length, "window") : place.window ? "this window" : "what is missing";
  const job = summary.jobs.find((each) => each.name === drilled.job), data = { job: drilled.job, part };
  const buttons = [fault && job.can_verify ? press(".main", { ...data, act: "heal", needs: "ops:run" }, `Heal ${what}`) : null, job.can_verify ? press("", { ...data, act: "verifyPart", needs: "ops:run" }, "Verify") : null, place.window?.run_id ? make("a.button", { href: `run?id=${place.window.run_id}` }, "Open its run") : null];
  box.replaceChildren(make("div.head", crumbs, make("span.push.head-acts", ...acts)), ...(cells.length ? [make("div.cells", { cells: cells.length }, ...cells)] : []), make("div.about", make("p", ...aboutPlace(place, finer, bad)), make("div.acts.pager", ...buttons)), ...(box.contains(held) ? [held] : []));
  lockActions();
}
function aboutPlace(place, finer, bad) {
  const { window } = place;
  if (window) {
    const there = `${plural(window.rows, "row")} delivered, ${plural(window.objects, "object")}${window.bytes ? `, ${size(window.bytes)}` : ""}.`, at_ = window.delivered_at ? [" Last written ", when(window.delivered_at), "."] : [];
    return { m: ["Missing at the destination: ", there, ...at_], p: ["Some of its objects are gone: ", there, ...at_], c: ["Not what was delivered: somebody changed it. ", there, ...at_], k: ["All there: ", there, ...at_], o: ["Still filling. ", there], l: ["Late: not read yet. It waits at the source."], n: ["The source had no rows here."] }[place.letter] || [KIND[place.letter][1]];
  }
  if (!finer.length) return ["No window has begun here yet."];
  if (bad.length) return [`${drilled.name}, ${cellWhen(place.from, place.to)}: ${finer[0].window ? `${bad.length} of ${plural(finer.length, "window")} ${KIND[bad[0].letter][1]}` : KIND[bad[0].letter][1]}. Choose a finer cell, or heal all of it.`];
  return [`${drilled.name}, ${cellWhen(place.from, place.to)}: ${finer.map((each) => each.letter).every((letter) => letter === "k") ? "all there" : counted(finer.map((each) => each.letter).join(""))}.`];
}
Object.assign(ACTS, {
  closeDrill: () => closeDrill(true),
  drillTo: ({ dataset }) => drill(drilled.path.slice(0, Number(dataset.to) + 1), true),
  drillInto: ({ dataset }) => drill([...drilled.path, drilled.finer[Number(dataset.i)]], true),
  async drillMove(button) {
    const by = Number(button.dataset.by), { path } = drilled, last = path.at(-1), length = new Date(last.to) - new Date(last.from);
    if (path.length === 1) { const beside = drilled.cell.parentNode.children[Number(drilled.cell.dataset.i) + by]; if (beside && !beside.disabled) openCell(beside); return; }
    const moved = (text) => new Date(new Date(text).getTime() + by * length).toISOString();
    await drill([...path.slice(0, -1), { from: moved(last.from), to: moved(last.to), letter: "" }], false);
    [...drilled.box.querySelectorAll(".head .lined")].find((each) => each.textContent === button.textContent)?.focus();
  },
  async verifyPart(button) { await post(button.dataset.job, "verify", JSON.parse(button.dataset.part)); page.every = 1000; await turn(); },
});
function showFault(job) {
  setTimeout(() => { const cell = at(`map-${job}`)?.querySelector(".cell.missing, .cell.partial, .cell.changed, .cell.late"); if (cell && !(drilled && drilled.cell === cell)) openCell(cell); }, 50);
}

// ---- keys: one tab stop a map

at("maps").addEventListener("click", (event) => { const cell = event.target.closest(".map-row .cell"); if (cell) openCell(cell); });
at("maps").addEventListener("keydown", (event) => {
  const here = event.target, box = here.closest(".drill");
  if (box) {
    const all = [...box.querySelectorAll(".cells .cell")], i = all.indexOf(here);
    if (event.key === "Escape") { if (drilled.path.length > 1) drill(drilled.path.slice(0, -1), true); else closeDrill(true); }
    if (i >= 0 && event.key === "ArrowRight") all[Math.min(i + 1, all.length - 1)].focus();
    if (i >= 0 && event.key === "ArrowLeft") all[Math.max(i - 1, 0)].focus();
    return;
  }
  if (!here.matches(".map-row .cell")) return;
  const grid = here.closest("[role=grid]"), row = [...here.parentNode.children], rows = [...grid.querySelectorAll(".map-row")], i = row.indexOf(here), r = rows.indexOf(rowOf(here));
  const cellAt = (y, x) => rows[Math.max(0, Math.min(rows.length - 1, y))].querySelectorAll(".cell")[Math.max(0, Math.min(row.length - 1, x))];
  const bad = () => { const all = [...grid.querySelectorAll(".map-row .cell")], some = all.filter((cell) => cell.dataset.bad); return some.find((cell) => all.indexOf(cell) > all.indexOf(here)) || some[0]; };
  const to = { ArrowRight: () => cellAt(r, i + 1), ArrowLeft: () => cellAt(r, i - 1), ArrowDown: () => cellAt(r + 1, i), ArrowUp: () => cellAt(r - 1, i), Home: () => cellAt(r, 0), End: () => cellAt(r, 1e6), PageDown: () => cellAt(r + 10, i), PageUp: () => cellAt(r - 10, i), n: bad, N: bad }[event.key];
  if (event.key === "Escape") closeDrill(true);
  if (!to) return;
  event.preventDefault();
  const next = to();
  if (next) { here.tabIndex = -1; next.tabIndex = 0; next.focus(); }
});
at("only").checked = view.get("problems") === "1";
at("find").value = view.get("find") || "";
at("only").addEventListener("change", () => { pages = {}; keep({ problems: at("only").checked ? "1" : "" }); closeDrill(false); showMaps(true); });
at("find").addEventListener("input", () => { pages = {}; keep({ find: at("find").value.trim() }); clearTimeout(finding); finding = setTimeout(() => { closeDrill(false); showMaps(true); }, 250); });
let finding = 0, wasNarrow = narrow();
addEventListener("resize", () => { if (narrow() !== wasNarrow && summary) { wasNarrow = narrow(); closeDrill(false); showMaps(true); } });
