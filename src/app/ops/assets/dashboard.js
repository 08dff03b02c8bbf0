"use strict";
// Texts from data are only ever set by textContent; elements are made here, so no data can become markup.

const EVERY_MS = 4000;
const CHART_RUNS = 40;
const at = (id) => document.getElementById(id);
const WORDS = { waiting: "waiting", running: "running", backfill: "backfilling", paused: "paused", off: "off" };
let scopes = new Set();
let jobToFill = "";
let timer = 0;
let jobsOn = new Set();
let mapsDrawn = false;

async function ask(method, path, body) {
  const options = { method, headers: {}, credentials: "same-origin" };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(path, options);
  const text = await answer.text();
  let data = {};
  try { data = text ? JSON.parse(text) : {}; } catch { data = {}; }
  if (answer.ok || path === "ready") return data;
  const said = data.error || { message: `the service answered ${answer.status}`, hint: "" };
  throw Object.assign(new Error(said.hint ? `${said.message}. Next: ${said.hint}` : said.message), { status: answer.status });
}

const number = (value) => value.toLocaleString("en-US");

function span(seconds) {
  const s = Math.round(Math.abs(seconds));
  if (s < 90) return `${s} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 129600) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} d`;
}

function lagText(seconds) { return seconds < 0 ? `${span(seconds)} ahead of now` : span(seconds); }

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let step = 0;
  while (bytes >= 1000 && step < units.length - 1) { bytes /= 1000; step += 1; }
  return `${step && bytes < 10 ? bytes.toFixed(1) : Math.round(bytes)} ${units[step]}`;
}

const clock = (text) => (text ? text.replace("T", " ").replace(/\.\d+Z$/, "Z") : "never");

function moment(text, now) {
  const node = make("time", "", "never");
  if (!text) return node;
  const seconds = (now - new Date(text)) / 1000;
  node.textContent = seconds >= 0 ? `${span(seconds)} ago` : `in ${span(seconds)}`;
  node.dateTime = text;
  node.title = clock(text);
  return node;
}

function term(name, ...values) { return [make("dt", "", name), make("dd", "", ...values)]; }

function trouble(run) {
  if (!run || !run.error) return null;
  const box = make("div", run.outcome === "failed" ? "trouble" : "trouble mild", make("p", "", run.error));
  if (run.hint) box.append(make("p", "hint quiet", run.hint));
  return box;
}

function chart(runs) {
  const shown = runs.slice(0, CHART_RUNS).reverse();
  if (shown.length < 2) return null;
  const most = Math.max(1, ...shown.map((run) => run.rows));
  const width = 100 / CHART_RUNS;
  const bars = shown.map((run, place) => {
    const height = Math.max(1.5, (run.rows / most) * 38);
    const x = (CHART_RUNS - shown.length + place) * width;
    const title = svg("title", {});
    title.textContent = `${clock(run.started_at)}: ${run.outcome}, ${number(run.rows)} rows`;
    return svg("rect", { x, y: 40 - height, width: width * 0.75, height, class: run.outcome }, title);
  });
  const label = `Rows of the last ${shown.length} runs, at most ${number(most)}`;
  const drawn = svg("svg", { class: "chart", viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img", "aria-label": label }, ...bars);
  return make("figure", "", drawn, make("figcaption", "quiet", `rows per run, at most ${number(most)}`));
}

function bar(progress) {
  if (!progress) return null;
  const node = document.createElement("progress");
  if (progress.total > 0) { node.max = progress.total; node.value = progress.done; }
  const rows = progress.rows ? `, ${number(progress.rows)} rows` : "";
  const text = progress.total > 0 ? `${number(progress.done)} of ${number(progress.total)} done${rows}` : `working${rows}`;
  return make("div", "", node, make("span", "quiet", text));
}

function button(text, plain, act) {
  const node = make("button", plain ? "plain" : "", text);
  node.type = "button";
  node.disabled = !scopes.has("ops:run");
  if (node.disabled) node.title = "needs a key with the scope ops:run";
  node.addEventListener("click", () => attempt(act));
  return node;
}

function buttons(job) {
  const to = (what) => () => ask("POST", `ops/jobs/${encodeURIComponent(job.name)}/${what}`);
  const row = make("div", "row", button("Run now", false, to("run")));
  row.append(job.state === "paused" ? button("Resume", true, to("resume")) : button("Pause", true, to("pause")));
  if (job.can_backfill) row.append(button("Backfill…", true, async () => openBackfill(job.name)));
  return row;
}

function lagOf(job, partitions) {
  const lags = partitions.filter((part) => part.job === job.name && part.lag_seconds !== null).map((part) => part.lag_seconds);
  return lags.length ? Math.max(...lags) : null;
}

function card(job, runs, partitions, now) {
  const last = job.last_run;
  const idle = job.state === "waiting" && last;
  const word = job.stale ? "stale" : idle ? last.outcome : job.state;
  const badge = make("span", `badge ${word}`, WORDS[word] || word);
  const box = make("article", "card job", make("div", "head", make("h3", "", job.name), badge));
  if (job.state === "off") {
    box.append(make("p", "quiet", `Off: ${job.off}`));
    return box;
  }
  const facts = make("dl", "", ...term("Every", span(job.interval_seconds)));
  if (last) {
    const rows = last.outcome === "running" ? "" : `, ${number(last.rows)} rows, ${size(last.bytes)}`;
    facts.append(...term("Last run", moment(last.started_at, now), rows));
  } else {
    facts.append(...term("Last run", "none yet"));
  }
  if (last && last.ledger_text) facts.append(...term("Ledger", last.ledger_text));
  facts.append(...term("Next run", job.next_run_at ? moment(job.next_run_at, now) : "when resumed"));
  const lag = lagOf(job, partitions);
  if (lag !== null) facts.append(...term("Lag", lag < 0 ? lagText(lag) : `${span(lag)} at most`));
  if (job.clock_ahead_seconds) facts.append(...term("Clock", `records lie ${span(job.clock_ahead_seconds)} ahead of now`));
  if (job.rows_total) facts.append(...term("Moved", `${number(job.rows_total)} rows in ${number(job.runs_total)} runs`));
  if (job.calls) facts.append(...term("Calls", `${number(job.calls.today)} of ${number(job.calls.a_day)} today`));
  if (job.queued_backfills) facts.append(...term("Backfills", `${job.queued_backfills} waiting`));
  const parts = [facts, bar(job.progress), trouble(last), chart(runs.filter((run) => run.job === job.name)), buttons(job)];
  box.append(...parts.filter(Boolean));
  return box;
}

function table(heads, lines) {
  const head = make("tr", "", ...heads.map(([text, kind]) => make("th", kind, text)));
  const rows = lines.map((cells) => make("tr", "", ...cells.map((cell, place) => make("td", heads[place][1], cell))));
  return make("table", "", make("thead", "", head), make("tbody", "", ...rows));
}

function fill(id, node) { at(id).replaceChildren(node); }

function showJobs(data, runs, partitions, now) {
  const busy = at("jobs").contains(document.activeElement) ? document.activeElement : null;
  const place = busy ? [...at("jobs").querySelectorAll("button")].indexOf(busy) : -1;
  const cards = data.jobs.map((job) => card(job, runs, partitions, now));
  const empty = make("p", "empty", "No job is configured. Set INFLUXDB_URL (see README) or try: python -m app demo");
  at("jobs").replaceChildren(...(cards.length ? cards : [empty]));
  if (place >= 0) at("jobs").querySelectorAll("button")[place]?.focus();
}

function showPartitions(data, now) {
  at("partition-count").textContent = data.total > data.partitions.length ? `${data.partitions.length} of ${number(data.total)}` : "";
  if (!data.partitions.length) {
    fill("partitions", make("p", "empty", "No partition yet: they appear with the first run that finds data."));
    return;
  }
  const heads = [["Job", ""], ["Partition", ""], ["State", ""], ["Lag", "number"], ["Newest event", ""], ["Finished up to", ""], ["Error", "text"]];
  fill("partitions", table(heads, data.partitions.map((part) => [
    part.job, part.partition, make("span", `badge ${part.status}`, part.status),
    part.lag_seconds === null ? "–" : lagText(part.lag_seconds),
    moment(part.high_watermark_at, now), clock(part.cursor_at), part.error,
  ])));
}

function showRuns(runs, now) {
  if (!runs.length) {
    fill("runs", make("p", "empty", "No run yet. Jobs start by themselves; “Run now” starts one at once."));
    return;
  }
  const heads = [["Started", ""], ["Job", ""], ["Outcome", ""], ["Took", "number"], ["Rows", "number"], ["Bytes", "number"], ["Windows", "number"], ["Ledger", "text"], ["Error", "text"]];
  fill("runs", table(heads, runs.slice(0, 25).map((run) => [
    moment(run.started_at, now), run.job, make("span", `badge ${run.outcome}`, run.outcome),
    run.ended_at ? `${((new Date(run.ended_at) - new Date(run.started_at)) / 1000).toFixed(1)} s` : "–",
    number(run.rows), size(run.bytes), number(run.windows), run.ledger_text, run.hint ? `${run.error}. Next: ${run.hint}` : run.error,
  ])));
}

function cell(name, value, now) {
  if (name === "at") return moment(value, now);
  if (name === "outcome") return make("span", `badge ${value}`, value);
  return typeof value === "number" ? number(value) : String(value ?? "");
}

function showHistories(histories, now) {
  const parts = histories.filter((history) => history.entries.length).flatMap(({ job, entries }) => {
    const names = Object.keys(entries[0]);
    const heads = names.map((name) => [name, typeof entries[0][name] === "number" ? "number" : name === "error" ? "text" : ""]);
    const lines = entries.map((entry) => names.map((name) => cell(name, entry[name], now)));
    return [make("h2", "", `Taken in by ${job}`), make("div", "scroll", table(heads, lines))];
  });
  at("histories").replaceChildren(...parts);
  at("histories").hidden = !parts.length;
}

function showChecks(ready) {
  const names = { worker_running: "worker", checkpoint_store_connected: "checkpoints", s3_accessible: "objects", dwh_connected: "warehouse" };
  const items = Object.entries(ready.checks || {}).map(([name, ok]) => {
    const item = make("li", `badge ${ok ? "ok" : "failed"}`, `${names[name] || name} ${ok ? "✓" : "✗"}`);
    item.title = (ready.notes || {})[name] || (ok ? "reached" : "cannot be reached");
    return item;
  });
  at("checks").replaceChildren(...items);
}

function notice(text) { at("notice").textContent = text; at("notice").hidden = !text; }

function signedOut() {
  if (at("sign-in").hidden) { at("sign-in").hidden = false; at("key").focus(); }
  at("board").hidden = true;
  at("sign-out").hidden = true;
  notice("");
}

async function refresh() {
  showChecks(await ask("GET", "ready"));
  const who = await ask("GET", "ops/session");
  scopes = new Set(who.scopes);
  at("sign-in").hidden = true;
  at("board").hidden = false;
  at("rest").hidden = false;
  at("sign-out").hidden = !who.keys;
  const [jobs, runs, partitions, history] = await Promise.all([
    ask("GET", "ops/jobs"), ask("GET", "ops/runs?limit=200"), ask("GET", "ops/partitions"), ask("GET", "ops/history?limit=25"),
  ]);
  const now = new Date(jobs.now);
  jobsOn = new Set(jobs.jobs.filter((job) => job.state !== "off").map((job) => job.name));
  showJobs(jobs, runs.runs, partitions.partitions, now);
  showPartitions(partitions, now);
  showHistories(history.histories, now);
  showRuns(runs.runs, now);
  at("updated").textContent = `updated ${clock(jobs.now).slice(11)}`;
  notice("");
  if (!mapsDrawn) { mapsDrawn = true; drawMaps(); }
}

async function turn() {
  clearTimeout(timer);
  try {
    await refresh();
  } catch (error) {
    if (error.status === 401) signedOut();
    else notice(error instanceof TypeError ? "The service cannot be reached; trying again." : error.message);
  }
  timer = setTimeout(turn, document.hidden ? EVERY_MS * 5 : EVERY_MS);
}

async function attempt(act) {
  try { await act(); await turn(); } catch (error) { notice(error.message); }
}

function openBackfill(job) {
  jobToFill = job;
  at("backfill-job").textContent = job;
  at("backfill-error").textContent = "";
  at("backfill").showModal();
}

at("backfill-cancel").addEventListener("click", () => at("backfill").close());
at("backfill-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const utc = (id) => `${at(id).value}Z`;
  try {
    await ask("POST", `ops/jobs/${encodeURIComponent(jobToFill)}/backfill`, { from: utc("from"), to: utc("to") });
    at("backfill").close();
    await turn();
  } catch (error) { at("backfill-error").textContent = error.message; }
});
at("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("sign-in-error").textContent = "";
  try {
    await ask("POST", "ops/session", { key: at("key").value.trim() });
    at("key").value = "";
    await turn();
  } catch (error) { at("sign-in-error").textContent = error.message; }
});
at("sign-out").addEventListener("click", () => attempt(() => ask("DELETE", "ops/session")));
document.addEventListener("visibilitychange", () => { if (!document.hidden) turn(); });
ask("GET", "health").then((data) => { at("version").textContent = data.version || ""; }, () => {});
turn();
