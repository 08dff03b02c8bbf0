"use strict";
// The gap map: one line per partition, one cell per window, from the destination's own listing. A click heals a cell.
// Uses the parts of dashboard.js, which is loaded before.

const MAP_EVERY_MS = 15000;
const QUICK_MS = 1500;
const QUICK_FOR_MS = 30000;
const CELL_PX = 17;
const STATES = {
  equal: ["equal", "as confirmed"], open: ["open", "not closed yet"], waiting: ["waiting", "the next run writes it"],
  empty: ["empty", "nothing was to be written"],
  missing: ["missing", "not there"], partial: ["partial", "some objects are gone"], stale: ["stale", "changed by somebody else"],
};
const GLYPHS = { equal: "", open: "·", waiting: "…", empty: "", missing: "–", partial: "◐", stale: "!" };
const SIGNS = { "=": "equal", "-": "missing", "+": "only at the destination", "*": "differs", "!": "error" };
const HEALABLE = new Set(["missing", "partial", "stale"]);
let hoursShown = 24;
let mapTimer = 0;
let toHeal = null;
let quickUntil = 0;

const shortTime = (text) => text.slice(5, 16).replace("T", " ");

const labelPx = () => parseInt(getComputedStyle(document.documentElement).getPropertyValue("--label"), 10);

function cellsThatFit() {
  return Math.max(8, Math.floor((at("maps").clientWidth - labelPx() - 40) / CELL_PX));
}

function mapCell(job, partition, cell) {
  const [word, about] = STATES[cell.state];
  const can = scopes.has("ops:run") && (HEALABLE.has(cell.state) || cell.state === "equal");
  const node = make(can ? "button" : "span", `cell ${cell.state}`, GLYPHS[cell.state]);
  const objects = `${cell.objects} object${cell.objects === 1 ? "" : "s"}`;
  const text = `${partition}, ${clock(cell.start)} to ${clock(cell.end).slice(11)}: ${word}, ${about}; ${number(cell.rows)} rows confirmed, ${objects}`;
  node.title = text;
  if (!can) { node.setAttribute("role", "img"); node.setAttribute("aria-label", text); return node; }
  node.type = "button";
  node.setAttribute("aria-label", text);
  node.addEventListener("click", () => openHeal(job, partition, cell, text));
  return node;
}

function mapOf(data) {
  const fits = cellsThatFit();
  const lines = data.partitions.map((line) => {
    const label = make("span", "label", line.partition);
    label.title = line.partition;
    if (line.error) return make("div", "line", label, make("span", "bad", line.error));
    const shown = line.cells.slice(-fits);
    return make("div", "line", label, make("span", "cells", ...shown.map((cell) => mapCell(data.job, line.partition, cell))));
  });
  const first = data.partitions.find((line) => line.cells.length);
  if (!first) return make("p", "empty", "No window yet: they appear with the first run that finds data.");
  const span = first.cells.slice(-fits);
  const axis = make("div", "axis quiet", make("span", "", shortTime(span[0].start)), make("span", "", "now"));
  axis.style.width = `${labelPx() + span.length * CELL_PX}px`;
  const more = data.total > data.partitions.length ? make("p", "quiet", `${data.partitions.length} of ${number(data.total)} partitions`) : null;
  return make("div", "map", ...lines, axis, more);
}

function counts(result) {
  return Object.entries(result.counts).map(([sign, n]) => `${number(n)} ${SIGNS[sign]}`).join(", ") || (result.ended_at ? "nothing was compared: no window has ended yet" : "no window yet");
}

function proofOf(result, now) {
  if (!result) return make("p", "quiet", "Not verified yet. Verifying reads both ends of each window and compares their content.");
  const span = `${shortTime(result.from)} to ${shortTime(result.to)}`;
  const state = result.ended_at ? ["verified ", moment(result.ended_at, now)] : ["verifying"];
  const box = make("div", "proof", make("p", "", ...state, `, ${span}: `, make("strong", "", counts(result))));
  if (result.error) box.append(make("p", "bad", result.hint ? `${result.error}. Next: ${result.hint}` : result.error));
  const list = make("ul", "verdicts");
  for (const each of result.windows.slice(0, 12)) {
    const rows = `${each.source_rows ?? "?"} rows at the source, ${each.destination_rows ?? "?"} at the destination`;
    const why = each.error ? `: ${each.error}` : "";
    const item = make("li", "", make("code", "", each.sign), ` ${each.partition} ${shortTime(each.start)}: ${SIGNS[each.sign]}, ${rows}${why} `);
    if (result.ended_at) {
      item.append(button("Heal", true, () => heal(result.job, { from: each.start, to: each.end, partition: each.partition })));
    }
    list.append(item);
  }
  if (result.windows.length) box.append(list);
  return box;
}

async function heal(job, body) {
  await ask("POST", `ops/jobs/${encodeURIComponent(job)}/heal`, body);
  quickUntil = Date.now() + QUICK_FOR_MS;
  clearTimeout(mapTimer);
  mapTimer = setTimeout(drawMaps, QUICK_MS);
}

function verifyButton(job) {
  return button(`Verify ${span(hoursShown * 3600)}`, false, async () => {
    const to = new Date();
    const from = new Date(to - hoursShown * 3600 * 1000);
    await ask("POST", `ops/jobs/${encodeURIComponent(job)}/verify`, { from: from.toISOString(), to: to.toISOString() });
    await drawMaps();
  });
}

async function mapCard(job, results, now) {
  const box = make("article", "card mapcard", make("div", "row", make("h3", "", job), verifyButton(job)));
  try {
    box.append(mapOf(await ask("GET", `ops/gaps?job=${encodeURIComponent(job)}&hours=${hoursShown}`)));
  } catch (error) { box.append(make("p", "bad", error.message)); }
  box.append(proofOf(results.find((result) => result.job === job), now));
  return box;
}

async function drawMaps() {
  clearTimeout(mapTimer);
  let wait = MAP_EVERY_MS;
  try {
    if (!at("board").hidden && !document.hidden && !at("heal").open) {
      const { jobs, maps, verifications } = await ask("GET", "ops/verifications");
      const on = maps.filter((job) => jobsOn.has(job));
      at("delivery").hidden = !on.length; // before the cards, which ask how wide it is
      const cards = await Promise.all(on.map((job) => mapCard(job, verifications, new Date())));
      at("maps").replaceChildren(...cards);
      if (Date.now() < quickUntil || verifications.some((result) => !result.ended_at)) wait = QUICK_MS;
    }
  } catch { wait = MAP_EVERY_MS; }
  mapTimer = setTimeout(drawMaps, wait);
}

function openHeal(job, partition, cell, text) {
  toHeal = { job, body: { from: cell.start, to: cell.end, partition } };
  at("heal-text").textContent = text;
  at("heal-error").textContent = "";
  at("heal").showModal();
}

for (const [word, about] of Object.values(STATES)) {
  at("legend").append(make("li", "", make("span", `cell ${word}`, GLYPHS[word]), `${word}: ${about}`));
}
at("hours").addEventListener("change", () => { hoursShown = Number(at("hours").value); drawMaps(); });
at("heal-cancel").addEventListener("click", () => at("heal").close());
at("heal-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await heal(toHeal.job, toHeal.body);
    at("heal").close();
    await turn();
  } catch (error) { at("heal-error").textContent = error.message; }
});
addEventListener("resize", () => { clearTimeout(mapTimer); mapTimer = setTimeout(drawMaps, 400); });
