"use strict";
// The overview: one sentence, what to do, each pipeline in a row. The delivery map is in map.js, the runs in runs.js.
const GUIDED = { influx_to_s3: "Readings from InfluxDB to Parquet files in S3, by device and window.", dynamo_to_drive: "A DynamoDB table to hourly CSV files in a Google Drive folder.", csv_inbox: "CSV files from a directory, merged into one master file by key.", amplitude: "Amplitude events by hour to the object store and the warehouse.", appmetrica: "AppMetrica events to the object store and the warehouse." };
let summary = null;
runsShown = 12;
let proofs = { verifications: [], heals: [] };

function sentenceOf(found) {
  const { parts, state } = found.verdict;
  const linked = parts.map((part) => (part.href ? make("a", { href: part.href }, part.text) : part.text));
  const nodes = linked.flatMap((node, place) => [place === 0 ? null : place < linked.length - 1 ? ", " : linked.length > 2 ? ", and " : " and ", node]);
  const upTo = found.complete_up_to ? when(found.complete_up_to, false) : null;
  if (state === "ok") return [...nodes, ...(upTo ? [", complete up to ", upTo] : []), "."];
  return state === "off" ? nodes : [...nodes, "."];
}
function moreOf(found) {
  const upTo = found.complete_up_to ? when(found.complete_up_to, false) : null, parts = [];
  if (!["ok", "off"].includes(found.verdict.state)) parts.push(...(upTo ? ["Everything else has arrived, complete up to ", upTo, ". "] : []));
  if (found.verdict.more) parts.push(`${found.verdict.more} `);
  if (found.checked_at) parts.push(ago(found.checked_at, "Both ends were compared ", "."));
  else if (found.verdict.state === "off") parts.push("Set one up below: its command asks for what it needs, tries it and writes .env. Then restart.");
  return parts;
}

// ---- what to do

function actions(problem) {
  return problem.actions.map((action, place) => {
    if (action.needs && !may(action.needs)) return null;
    if (action.href) return make("a.button", { href: action.href, data: { key: action.kind, act: action.kind === "show" ? "showFault" : "", job: problem.job } }, action.label);
    const data = { key: action.kind, act: action.kind, job: action.job || problem.job, id: problem.id, part: action.part && JSON.stringify(action.part), needs: "ops:run" };
    return press(place === 0 && action.kind === "heal" ? ".main" : "", data, action.label);
  });
}
function todo(problem) {
  const spanned = problem.from ? [", ", from_to(problem.from, problem.to)] : problem.since ? [problem.kind === "set_aside" ? ", " : " since ", when(problem.since, false)] : [];
  return make("li", { data: { key: problem.id } }, mark(problem.mark),
    make("div", make("strong", problem.title, ...spanned, "."), ` ${sentence(problem.message)}`, problem.from && problem.since ? [" First seen ", when(problem.since, false), "."] : null, problem.next ? nextStep(problem.next) : null),
    make("div.acts", ...actions(problem)));
}

// ---- pipelines

function why(job) {
  if (job.mark === "run" || (job.progress && job.state !== "waiting")) {
    const { done, total, rows } = job.progress || {};
    return total ? `${number(done)} of ${number(total)} done${rows ? `, ${plural(rows, "row")}` : ""}` : rows ? `working, ${plural(rows, "row")}` : "working";
  }
  if (job.mark === "paused") return [`by ${job.paused_by || "somebody"}`, job.paused_at ? [", ", when(job.paused_at, false)] : ""].flat();
  const last = job.last_run;
  if (!last) return "no run yet";
  if (job.failures_in_a_row && job.mark === "bad") return [`${last.error.slice(0, 60)}${last.error.length > 60 ? "…" : ""} since `, when(job.failing_since, false)];
  if (job.mark === "ok") return ago(last.started_at, "ran ");
  return ago(last.started_at, `last run ${last.outcome === "ok" ? "OK" : (OUTCOMES[last.outcome] || ["", last.outcome])[1].toLowerCase()}, `);
}
function helpers(job, all) {
  const own = all.filter((each) => each.helper_of === job.name && each.state !== "off");
  const parts = own.flatMap((each, place) => [place ? " · " : "", helperName(each, job), " ", each.last_run ? ago(each.last_run.started_at) : "not yet", each.failures_in_a_row ? " (failed)" : ""]);
  if (parts.length) return parts;
  if (job.files_today) return filesToday(job.files_today);
  if (job.partitions > 1) return plural(job.partitions, "partition");
  return "";
}
const filesToday = ({ total, more }) => `${number(total)}${more ? " or more" : ""} ${total === 1 ? "file" : "files"} today`;
const helperName = (each, job) => ({ reconcile: "full check", late: "late rows" })[each.name.slice(job.name.length + 1)] || each.name;
function bars(news) {
  if (!news) return null;
  const most = Math.max(1, ...news.by_hour);
  const rects = news.by_hour.map((rows, i) => { const failed = news.failed_hours.includes(i), height = failed ? 24 : Math.max(rows ? 1.5 : 0.5, (rows / most) * 24); return make("rect", { x: i * 5.7, y: 24 - height, width: 4, height, class: failed ? "bad" : null }); });
  return make("svg.bars", { viewBox: "0 0 136 24", role: "img", "aria-label": `New rows by hour, last 24 hours; highest ${number(most)}` }, ...rects);
}
function strip(job) {
  if (!job.strip) return make("span.quiet.small", "not known yet");
  return make("div.cells.strip", { role: "img", "aria-label": `Last 24 hours, hour by hour: ${counted(job.strip)}` }, ...[...job.strip].map((letter) => make("span", { class: `cell ${KIND[letter][0]}`, title: KIND[letter][1] })));
}
function nextRun(job) {
  if (job.state === "paused") return "when resumed";
  if (["running", "backfill"].includes(job.state)) return "now";
  return job.next_run_at ? ago(job.next_run_at, "", "next") : "–";
}
function jobMenu(job) {
  const act = (name) => ({ act: name, job: job.name, needs: "ops:run" });
  const missing = summary.problems.find((each) => each.job === job.name && each.actions.some((action) => action.kind === "heal"));
  const heal = missing && missing.actions.find((action) => action.kind === "heal");
  return menu(`Actions for ${job.name}`, [["Run now", act("run")], job.can_verify ? ["Verify last 24 h", act("verifyDay")] : null, heal ? [heal.label, { ...act("heal"), part: JSON.stringify(heal.part) }] : null, job.can_backfill ? ["Backfill…", act("backfill")] : null, [job.state === "paused" ? "Resume" : "Pause", act(job.state === "paused" ? "resume" : "pause"), true], ["Show runs", { act: "jobRuns", job: job.name }, true], ["Copy as command", { act: "copyRun", job: job.name }]]);
}
function pipelineRow(job, all) {
  const news = job.new_rows, done = job.progress && job.progress.total ? make("progress", { max: job.progress.total, value: job.progress.done, "aria-label": `${job.name} progress` }) : null;
  const more = news ? (news.updated_today ? `${number(news.updated_today)} updated` : `yesterday ${number(news.yesterday)}`) : "";
  return make("tr", { id: `p-${job.name}`, data: { key: `p-${job.name}` } },
    make("td.id", make("a.name", { href: job.has_map ? `#map-${job.name}` : "#histories" }, job.name), sub(helpers(job, all))),
    make("td.state", mark(job.mark), " ", make("strong", job.words), sub(why(job)), done),
    make("td.number", { "data-label": "Max lag" }, job.max_lag_seconds === null ? "–" : span(job.max_lag_seconds)),
    make("td.number", { "data-label": "New rows today" }, number(news ? news.today : 0), sub(more)),
    make("td.spark", bars(news)), make("td.wide", strip(job)),
    make("td.when-next.nowrap", nextRun(job), sub(`every ${span(job.interval_seconds)} `, press(".bare.lined.small", { act: "run", job: job.name, needs: "ops:run" }, "Run now", hidden(` ${job.name}`)))),
    make("td.act", jobMenu(job)));
}
const enable = (job) => (job.off.text.startsWith("set ") ? `Off. Set ${job.off.text.slice(4)} to enable.` : `Off: ${job.off.text}.`);
const guide = (job) => make("a", { href: job.off ? job.off.guide : `guides/${job.name}` }, "Guide", hidden(` to ${job.name}`));
function offLine(job) { return make("li", { data: { key: `p-${job.name}` } }, mark("off"), make("span", job.name), make("span.why", enable(job)), guide(job)); }
function setupStep(job) {
  const line = job.off ? command(`setup-${job.name}`, `python -m app setup ${job.name}`) : null;
  return make("li", { data: { key: job.name } }, make("div", make("h3", job.name), make("p.quiet", `${GUIDED[job.name] || ""} `, ...(job.off ? [enable(job)] : [mark("ok"), " On: put a file into its directory, and it is merged within a minute."]), " ", guide(job))), line);
}
function showSummary(found) {
  summary = found;
  skew = new Date(found.now) - Date.now();
  const { verdict: told, jobs } = found;
  verdict(told.state, sentenceOf(found), moreOf(found), told.title);
  at("todo").hidden = !found.problems.length;
  show(at("todo"), ...found.problems.map(todo));
  const rows = jobs.filter((job) => job.state !== "off" && !(job.helper_of && jobs.some((each) => each.name === job.helper_of)) && job.helper_of !== "housekeeping");
  const off = jobs.filter((job) => job.state === "off" && !job.helper_of);
  show(at("pipelines"), ...rows.map((job) => pipelineRow(job, jobs)));
  show(at("off"), ...off.map(offLine));
  at("bill").hidden = !found.bill;
  at("bill").textContent = `Requests: ${found.bill}.`;
  show(at("day"), "Today starts at ", when(found.day_starts_at, false), " local time. Counts are new rows; rewrites of an open window are not counted again.");
  const empty = told.state === "off" && told.title === "Nothing set up yet";
  at("setup").hidden = !empty;
  at("rows").hidden = empty;
  if (empty) show(at("steps"), ...jobs.filter((job) => !job.helper_of).map(setupStep), make("li", { data: { key: "demo" } }, make("div", make("h3", "Or look around first"), make("p.quiet", "Simulated sources and destinations with some hours of data. Nothing outside this machine is touched.")), command("demo-command", "python -m app demo")));
}

// ---- CSV files

const FILES = { merged: ["ok", "merged"], rejected: ["warn", "set aside"], undone: ["paused", "undone"] };
function showFiles({ histories }) {
  const shown = histories.filter((each) => each.entries.length);
  at("histories").hidden = !shown.length;
  show(at("histories"), ...shown.map(({ job, entries }) => {
    const today = summary.jobs.find((each) => each.name === job).files_today;
    const about = `${filesToday(today)}${today.total ? `: ${number(today.merged)} merged${today.set_aside ? `, ${number(today.set_aside)} set aside` : ""}` : ""}`;
    const all = view.get("files") === "all", rows = (all ? entries : entries.slice(0, 6)).map((each) => {
      const [kind, word] = FILES[each.outcome] || ["off", each.outcome], known = (value) => (each.outcome === "merged" ? number(value) : "");
      return make("tr", { data: { key: `${each.at} ${each.file} ${each.outcome}` } }, make("td.nowrap", when(each.at)), make("td.mono", each.file), state(kind, word), figure("new", known(each.inserted)), figure("updated", known(each.replaced)), figure("unchanged", known(each.unchanged)), make("td.long", each.error));
    });
    return make("div.map", { data: { key: job }, id: `files-${job}` }, make("div.head", make("h3", job), make("span.quiet.small", about), entries.length > 6 ? press(".bare.lined.push", { act: "allFiles" }, all ? "Latest files" : "All files") : null),
      make("div.scroll", make("table.stack", make("thead", headRow([["Ingested"], ["File"], ["Result"], ["New rows", 1], ["Updated", 1], ["Unchanged", 1], ["Reason"]])), make("tbody", ...rows))));
  }));
}

// ---- acts

const post = (job, what, body) => ask("POST", `ops/jobs/${encodeURIComponent(job)}/${what}`, body);
Object.assign(ACTS, {
  async run({ dataset }) { await post(dataset.job, "run"); await turn(); },
  async pause({ dataset }) { await post(dataset.job, "pause"); await turn(); },
  async resume({ dataset }) { await post(dataset.job, "resume"); await turn(); },
  async dismiss(button) { await ask("POST", `ops/problems/${button.dataset.id}/dismiss`); await turn(); },
  async heal(button) { await startHeal(button.dataset.job, JSON.parse(button.dataset.part), button); },
  async verifyDay(button) { await startVerify(button.dataset.job, 86400, button); },
  showFault(link) { showFault(link.dataset.job); },
  jobRuns({ dataset }) { keep({ job: dataset.job }); view.set("outcome", ""); history.replaceState(null, "", `${location.pathname}?${view}`); at("runs-title").scrollIntoView(); return turn(); },
  async copyRun(button) { await navigator.clipboard?.writeText(`python -m app run ${button.dataset.job}`).catch(() => {}); notice("ok", make("code", `python -m app run ${button.dataset.job}`), at("pipelines")); },
  allFiles() { keep({ files: view.get("files") === "all" ? "" : "all" }); return turn(); },
  backfill({ dataset }) {
    const now = new Date(), local = (date) => new Date(date - date.getTimezoneOffset() * 60000).toISOString().slice(0, 16);
    at("backfill-job").textContent = at("backfill").dataset.job = dataset.job;
    at("from").value = local(new Date(now - 864e5));
    at("to").value = local(now);
    at("backfill-error").textContent = "";
    at("backfill").showModal();
  },
});
at("backfill-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { job } = at("backfill").dataset, [from, to] = ["from", "to"].map((id) => new Date(at(id).value));
  try {
    await post(job, "backfill", { from: from.toISOString(), to: to.toISOString() });
    at("backfill").close();
    notice("ok", [`Backfill of ${job} queued: `, from_to(from.toISOString(), to.toISOString()), ". It runs as soon as the job is free; its row shows how far it is."].reduce((box, part) => { box.append(part); return box; }, make("span")), at("pipelines"));
    await turn();
  } catch (error) { at("backfill-error").textContent = said(error); }
});

begin({
  async refresh() {
    const [found, known] = await Promise.all([get("ops/summary", { tz: ZONE }), get("ops/verifications")]);
    proofs = known;
    showSummary(found);
    at("rest").hidden = !at("setup").hidden;
    await Promise.all([showMaps(), get("ops/history", { limit: 50 }).then(showFiles), showRuns(found.jobs.filter((job) => job.state !== "off").map((job) => job.name))]);
    at("rest").classList.remove("skeleton");
    at("rest").removeAttribute("aria-busy");
  },
});
