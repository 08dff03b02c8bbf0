"use strict";
// One run: what it did with every row, window by window, and its log.
const id = view.get("id") || "-"; // without one the server names no run, as for one that is gone
const ENTRIES = [["counted", "Counted at the source", "asked from the source", ""], ["new", "New", "delivered by this run", "="], ["already_there", "Already there", "delivered before, equal", "+"], ["corrected", "Corrected", "replaced with new values", "+"], ["set_aside", "Set aside", "kept, with the reason", "+"], ["waiting", "Waiting", "not delivered yet", "+"]];
const gapOf = (tally) => tally.counted - tally.new - tally.already_there - tally.corrected - tally.set_aside - tally.waiting;
const REQUESTS = { put: "PUT", list: "LIST", get: "GET", delete: "DELETE", read_unit: "read units" }, FEW = 12;
let level = "info";

function sayRun(run) {
  const { ledger } = run, gap = gapOf(ledger), windows = run.written.filter((each) => each.state === "missing" || each.state.startsWith("changed"));
  const failed = run.failures.map((each) => each.partition).filter(Boolean), started = when(run.started_at);
  if (!run.ended_at) return ["run", [run.progress && run.progress.total ? `Running: ${number(run.progress.done)} of ${number(run.progress.total)} done.` : "Running."], ["Started ", ago(run.started_at), ". What is not delivered yet counts as waiting."], `${run.job}: running`];
  if (gap) return ["bad", [`${plural(Math.abs(gap), ledger.unit)} unaccounted for.`], `The source counted ${number(ledger.counted)} ${ledger.unit}; the columns below add up to ${number(ledger.counted - gap)}.`, `${plural(Math.abs(gap), ledger.unit)} unaccounted for`];
  const kept = ledger.counted ? "Every row is accounted for." : "", name = `${run.job}, ${stamp(new Date(run.started_at), false)}`;
  if (windows.length) return ["bad", [`Delivered, but ${plural(windows.length, "window")} of it ${windows.length === 1 ? "is" : "are"} ${windows[0].state} now.`], kept, name];
  if (run.outcome === "failed") return ["bad", ["Failed: nothing more was delivered."], [run.seen_in_runs > 1 ? `The same error was seen in ${number(run.seen_in_runs)} runs.` : ""], `${run.job} failed`];
  if (run.outcome === "stopped") return ["paused", ["Stopped before its end."], "The next run goes on from the checkpoint.", name];
  if (run.outcome === "partial") {
    const names = `${failed.slice(0, 3).join(", ")}${failed.length > 3 ? ` and ${failed.length - 3} more` : ""}`, aside = asideOf(run);
    const parts = aside.files ? [`${names} ${failed.length === 1 ? "was" : "were"} set aside`] : [failed.length ? `${names} could not be finished` : "", aside.count ? `${plural(aside.count, ledger.unit)} set aside` : ""].filter(Boolean);
    return [failed.length && !aside.count ? "bad" : "warn", [`Partly delivered: ${parts.join(", and ") || "not all was delivered"}.`], kept, `${run.job} partly delivered`];
  }
  return ["ok", [run.windows ? `OK: ${plural(run.windows, "window")} delivered.` : run.rows ? "OK." : "OK: nothing new at the source."], kept, `OK, ${name}`, started];
}
// What this run set aside for the first time; `files`: whole files, each of which is a failure of the run, too.
function asideOf(run) {
  const count = run.ledger.reasons.reduce((sum_, each) => sum_ + each.new, 0);
  return { count, files: count > 0 && run.failures.length > 0 && run.failures.every((each) => run.ledger.partitions[each.partition]?.set_aside) };
}
function todoOf(run) {
  const failures = run.failures.length ? run.failures : run.error ? [{ partition: "", message: run.error, hint: run.hint }] : [];
  const items = failures.map((each) => make("li", { data: { key: each.partition + each.message } }, mark(run.outcome === "partial" && !gapOf(run.ledger) && (asideOf(run).files || !run.failures.length) ? "warn" : "bad"), make("div", each.partition ? make("strong", `${each.partition}: `) : null, sentence(each.message), run.seen_in_runs > 1 ? ` Seen in ${number(run.seen_in_runs)} runs.` : "", each.hint ? nextStep(each.hint) : null), asideOf(run).files ? null : make("div.acts", press("", { act: "runAgain", job: run.job, needs: "ops:run" }, "Run now"))));
  return items;
}
function facts(run) {
  const requests = Object.entries(run.requests).map(([kind, count]) => `${number(count, 0)} ${REQUESTS[kind] || kind}`).join(", ");
  const by = run.started_by === "schedule" ? `schedule, every ${span(run.interval_seconds || 0)}` : run.started_by;
  const tidy = [["Started", when(run.started_at)], ["Took", run.ended_at ? took(run) : ago(run.started_at)], ["Job", run.helper_of ? `${run.job}, of ${run.helper_of}` : run.job], ["Started by", by || null], ["Windows", number(run.windows)], ["New rows", number(run.new_rows)], ["Size written", size(run.bytes)], ["Late rows", run.late_rows ? number(run.late_rows) : null], ["Requests", requests || null], ["Run", make("span.mono", { title: run.run_id }, run.run_id.slice(0, 8))]];
  return tidy.filter(([, value]) => value !== null).map(([name, value]) => make("div", { data: { key: name } }, make("dt", name), make("dd", value)));
}
function sum([name, title, note, sign], ledger, running) {
  const value = ledger[name], kind = !value ? null : name === "set_aside" ? "text-warn" : name === "waiting" && !running ? "text-bad" : null;
  return make("div", { "data-sign": sign || null, data: { key: name } }, make("dt", title), make("dd", make("span", { class: kind }, number(value)), make("span.note", note)));
}
function ledgerRow(name, tally, kind) {
  const gap = gapOf(tally), [mark_, word] = gap ? ["bad", "unaccounted for"] : tally.waiting ? ["bad", "waiting"] : tally.set_aside ? ["warn", "rows set aside"] : ["ok", "OK"];
  return make("tr", { class: kind, data: { key: name } }, make("td", name), kind ? make("td") : state(mark_, word), ...ENTRIES.map(([entry, title]) => figure(title.toLowerCase().replace(" at the source", ""), number(tally[entry]), tally[entry] ? { set_aside: "text-warn", waiting: "text-bad" }[entry] : "quiet")));
}
function showLedger(run) {
  const { ledger } = run, gap = gapOf(ledger), running_ = !run.ended_at, named = Object.entries(Object.keys(ledger.partitions).length ? ledger.partitions : ledger.fields);
  at("ledger-part").hidden = !ledger.counted && !named.length;
  at("closes").className = `small ${ledger.closes ? "text-ok" : "text-bad"}`;
  show(at("closes"), mark(ledger.closes ? "ok" : "bad"), ledger.closes ? " The sum closes" : ` The sum does not close: ${plural(Math.abs(gap), ledger.unit)} in no column`);
  at("unit").textContent = ledger.closes ? `Every one of the ${ledger.unit} counted at the source is in exactly one column.` : "";
  show(at("sums"), ...ENTRIES.map((entry) => sum(entry, ledger, running_)), gap ? make("div", { "data-sign": "+", data: { key: "gap" } }, make("dt", "Unaccounted for"), make("dd", make("span.text-bad", number(gap)), make("span.note", "in no column"))) : null);
  const worst = ([, a], [, b]) => Math.abs(gapOf(b)) - Math.abs(gapOf(a)) || b.waiting - a.waiting || b.set_aside - a.set_aside;
  show(at("ledger-head"), ...(named.length ? [headRow([[Object.keys(ledger.partitions).length ? "Partition" : "Field"], ["State"], ...ENTRIES.map(([, title]) => [title.replace(" at the source", ""), 1])])] : []));
  show(at("ledger"), ...named.sort(worst).map(([name, tally]) => ledgerRow(name, tally)), named.length ? ledgerRow("All", ledger, "sum") : null);
  at("aside").hidden = !ledger.reasons.length;
  show(at("reasons"), ...ledger.reasons.map((each) => make("tr", { data: { key: each.reason } }, make("td", each.reason), figure("number", number(each.number)), figure("new", number(each.new)), make("td.long.mono", each.sample))));
}
async function showKept(run) {
  const { files, total } = run.ledger.set_aside ? await get(`ops/runs/${encodeURIComponent(id)}/set-aside`) : { files: [], total: 0 };
  at("kept").hidden = !total;
  show(at("kept"), "Kept: ", ...files.flatMap((file, i) => [i ? ", " : "", may(file.needs) ? make("a", { href: file.href, download: file.name.split("/").at(-1), data: { key: file.name } }, file.name) : make("span", { title: `Needs a key with the scope ${file.needs}` }, file.name), ` (${size(file.bytes)})`]), total > files.length ? ` and ${number(total - files.length)} more.` : ".");
}
function showWindows(run) {
  at("windows-part").hidden = !run.written.length;
  const kinds = { OK: "ok", "still filling": "run", missing: "bad" }, wrong = run.written.filter((each) => !["OK", "still filling"].includes(each.state)), every = view.get("windows") === "all";
  const listed = every ? run.written : [...wrong, ...run.written.filter((each) => !wrong.includes(each))].slice(0, Math.max(wrong.length, FEW));
  show(at("windows-about"), `${plural(run.written.length, "window")}${wrong.length ? `, ${number(wrong.length)} not as delivered` : ""}, written by this run and by no later one since. `, run.written.length > FEW ? press(".bare.lined.small", { act: "allWindows" }, every ? `First ${FEW}` : `All ${number(run.written.length)}`) : null);
  show(at("windows"), ...listed.map((each) => make("tr", { data: { key: `${each.partition} ${each.from}` } }, make("td.nowrap", from_to(each.from, each.to)), make("td", each.partition), state(kinds[each.state] || "bad", each.state, each.gone_since && [", seen ", when(each.gone_since, false)]), figure("rows", number(each.rows)), figure("size", size(each.bytes)), make("td.mono.long", each.object))));
}
const RANK = { debug: 0, info: 1, warn: 2, error: 3 };
function showLog({ lines, note, left_out: left }) {
  const count = (from) => lines.filter((line) => RANK[line.level] >= from).length, levels = [["info", `All ${number(count(0))}`], ["warn", `Warnings ${number(count(2))}`], ["error", `Errors ${number(count(3))}`]];
  show(at("levels"), ...choose("level", lines.length ? levels : [], level));
  at("levels").hidden = at("log").hidden = at("log-file").hidden = !lines.length;
  at("log-note").textContent = note || (left ? `${plural(left, "earlier line")} left out.` : "");
  const shown = lines.filter((line) => level === "info" || RANK[line.level] >= RANK[level]);
  show(at("log"), ...shown.map((line, place) => make("li", { class: { warn: "warning", error: "error" }[line.level], data: { key: `${line.time} ${place}` } }, make("span", { title: line.time }, clock(new Date(line.time), true) + line.time.slice(19, 23)), make("span", line.level === "warn" ? "warning" : line.level), make("span", line.exception ? `${line.message}\n${line.exception}` : line.message))));
  at("log-file").download = `run-${id.slice(0, 8)}.log`;
  at("log-file").href = `data:text/plain;charset=utf-8,${encodeURIComponent(lines.map((line) => `${line.time} ${line.level} ${line.message}`).join("\n"))}`;
}
function beside(run) {
  const link = (each, rel, words) => (each ? make("a", { href: `run?id=${each.run_id}`, rel, data: { key: rel } }, `${words}, `, when(each.started_at), `: ${OUTCOMES[each.outcome][1]}`) : null);
  show(at("beside"), link(run.previous, "prev", "Run before"), link(run.next, "next", "Run after"));
}
ACTS.level = ({ dataset }) => { ({ level } = dataset); return turn(); };
ACTS.allWindows = () => { keep({ windows: view.get("windows") ? "" : "all" }); return turn(); };
ACTS.runAgain = async (button) => { await ask("POST", `ops/jobs/${encodeURIComponent(button.dataset.job)}/run`); notice("ok", `${button.dataset.job} runs as soon as it is free.`, button); };
begin({
  every: 5000,
  async refresh() {
    let run;
    try { run = await get(`ops/runs/${encodeURIComponent(id)}`); } catch (error) {
      if (error.status !== 404) throw error;
      verdict("off", ["This run is not kept any more."], said(error), "Run");
      at("log-part").hidden = at("beside").hidden = true;
      page.every = 0;
      return;
    }
    const [kind, parts, more, title] = sayRun(run);
    verdict(kind, parts, more, title);
    show(at("crumbs"), make("li", make("a", { href: "runs" }, "Runs")), make("li", make("a", { href: `runs?job=${encodeURIComponent(run.job)}&outcome=` }, run.job)), make("li", when(run.started_at)));
    show(at("bar"), ...(run.progress && run.progress.total ? [make("progress", { max: run.progress.total, value: run.progress.done, "aria-label": "Done" })] : []));
    const items = todoOf(run);
    at("todo").hidden = !items.length;
    show(at("todo"), ...items);
    show(at("facts"), ...facts(run));
    show(at("again"), make("p.small.quiet", "The same as a command"), command("again-command", `python -m app run ${run.job}`));
    showLedger(run);
    showWindows(run);
    await Promise.all([showKept(run), get(`ops/runs/${encodeURIComponent(id)}/log`).then(showLog)]);
    beside(run);
    page.every = run.ended_at ? 15000 : 1000;
  },
});
