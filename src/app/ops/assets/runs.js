"use strict";
// A list of runs: on the overview the latest ones, on the page of its own all of them, filtered as the address says.
const OUTCOMES = { ok: ["ok", "OK"], partial: ["warn", "Partly delivered"], failed: ["bad", "Failed"], stopped: ["paused", "Stopped"], running: ["run", "Running"] };
const WHAT = [["news", "With news"], ["", "All outcomes"], ["failed", "Failed"], ["partial", "Partly delivered"], ["ok", "OK"], ["stopped", "Stopped"], ["running", "Running"]];
const SINCE = [["3600", "Last hour"], ["86400", "Last 24 h"], ["604800", "7 days"], ["2592000", "30 days"], ["", "All kept"]];
const HEADS = [["Started"], ["Job"], ["Outcome"], ["Took", 1], ["New rows", 1], ["Size", 1], ["Windows", 1], ["Error and next step"]];
const headRow = (heads) => make("tr", ...heads.map(([text, right]) => make("th", { class: right ? "number" : null }, text)));
let runsShown = 25;

const figure = (label, value, kind) => make("td.number", { "data-label": label }, kind ? make("span", { class: kind }, value) : value);
const state = (kind, ...words) => make("td.nowrap", mark(kind), " ", ...words);
const took = (run) => (run.ended_at ? lasting((new Date(run.ended_at) - new Date(run.started_at)) / 1000) : "so far");
const lasting = (seconds) => (seconds < 10 ? `${number(seconds, seconds < 1 ? 2 : 1)} s` : span(seconds));

function runRow(run) {
  const [kind, word] = OUTCOMES[run.outcome] || ["off", run.outcome];
  return make("tr", { data: { key: run.run_id } },
    make("td.nowrap", make("a", { href: `${ROOT}run?id=${encodeURIComponent(run.run_id)}` }, when(run.started_at))), make("td", run.job), state(kind, word),
    figure("took", took(run)), figure("new rows", number(run.new_rows)), figure("size", size(run.bytes)), figure("windows", number(run.windows)), make("td.long", sentence(run.error, run.hint)));
}
function choices(id, label, options, value) {
  const box = at(id) || make("select", { id, class: "field" });
  if (!box.isConnected) at("filters").append(make("div", make("label.visually-hidden", { for: id }, label), box));
  if (box.options.length !== options.length) box.replaceChildren(...options.map(([key, text]) => make("option", { value: key }, text)));
  if (document.activeElement !== box) box.value = value;
  return box;
}
function runFilters(jobs) {
  const names = [["", "All jobs"], ...jobs.map((name) => [name, name])];
  choices("f-job", "Job", names, view.get("job") || "");
  choices("f-outcome", "Outcome", WHAT, view.get("outcome") ?? "news");
  choices("f-time", "Time", SINCE, view.get("since") ?? "86400");
}
async function showRuns(jobs) {
  if (!at("f-job")) {
    runFilters(jobs);
    at("filters").addEventListener("change", (event) => {
      const name = { "f-job": "job", "f-outcome": "outcome", "f-time": "since" }[event.target.id], value = event.target.value;
      if (value === { job: "", outcome: "news", since: "86400" }[name]) view.delete(name); else view.set(name, value);
      keep({});
      return turn();
    });
    at("runs-head").append(headRow(HEADS));
  } else runFilters(jobs);
  const outcome = view.get("outcome") ?? "news", since = view.get("since") ?? "86400";
  const query = { job: view.get("job"), outcome: outcome === "news" ? "" : outcome, news: outcome === "news", limit: runsShown };
  if (since) query.from = new Date(Math.floor((Date.now() + skew) / 60000) * 60000 - since * 1000).toISOString();
  const found = await get("ops/runs", query);
  const rows = found.runs.map(runRow);
  show(at("runs"), ...(rows.length ? rows : [make("tr", { data: { key: "none" } }, make("td", { colspan: 8, class: "quiet" }, found.total || query.job || query.outcome || view.has("since") ? "No run matches these filters." : "No run yet. Jobs start by themselves; Run now starts one at once."))]));
  const left = found.total - found.with_news;
  const quiet = query.news && left > 0 ? [`${plural(left, "run")} found nothing new and ${left === 1 ? "is" : "are"} not listed. `, press(".bare.lined", { act: "allRuns" }, "List them")] : [];
  show(at("runs-quiet"), ...quiet);
  if (at("more")) at("more").hidden = !found.before || runsShown >= 500;
}
ACTS.allRuns = () => { view.set("outcome", ""); history.replaceState(null, "", `${location.pathname}?${view}${location.hash}`); return turn(); };
ACTS.moreRuns = () => { runsShown = Math.min(runsShown + 100, 500); return turn(); };
if (document.title.startsWith("Runs")) {
  runsShown = 100;
  begin({ refresh: async () => { const { jobs } = await get("ops/jobs"); await showRuns(jobs.filter((job) => job.state !== "off").map((job) => job.name)); document.title = "Runs – Headwater"; } });
}
