"use strict";
// Shared by all pages. Elements are made here and text is set by textContent only, so no data becomes markup.
const at = (id) => document.getElementById(id);
const ROOT = document.body.dataset.root;
const ZONE = Intl.DateTimeFormat().resolvedOptions().timeZone || "UTC";
const number = (value, digits) => (value ?? 0).toLocaleString("en-US", digits === undefined ? {} : { maximumFractionDigits: digits });
const plural = (count, noun) => { const one = noun.replace(/s$/, ""); return `${number(count)} ${count === 1 ? one : `${one}s`}`; };
const SVG = new Set(["svg", "rect", "line", "path", "g", "text", "circle"]);

// make("p.quiet.small", { title }, child, ...): the attributes may be left out; `data` are data attributes, `cells` is --n.
function make(selector, ...rest) {
  const [tag, ...classes] = selector.split("."), plain = Object.getPrototypeOf(rest[0] ?? 0) === Object.prototype;
  const { class: kind, data, cells, ...attributes } = plain ? rest.shift() : {};
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  if (kind) classes.push(kind);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  if (cells) node.style.setProperty("--n", cells);
  for (const [name, value] of Object.entries(attributes)) if (isThere(value)) node.setAttribute(name, value === true ? "" : value);
  for (const [name, value] of Object.entries(data || {})) if (isThere(value)) node.dataset[name] = value;
  node.append(...rest.flat().filter(isThere));
  return node;
}
const isThere = (value) => value !== null && value !== undefined && value !== false;
// A button does ACTS[data.act]; data.needs is the scope that it needs.
const press = (kind, data, ...text) => make(`button.button${kind}`, { type: "button", data }, ...text);
const choose = (act, options, chosen) => options.map(([value, text]) => make("button", { type: "button", "aria-pressed": String(value === chosen), data: { act, [act]: value } }, text));
const command = (id, text) => make("div.command", { data: { key: id } }, make("code", { id, tabindex: "0" }, text), press("", { act: "copy", copy: id }, "Copy", hidden(`: ${text}`)));
const mark = (kind, large) => make("span", { class: `mark ${large ? "large " : ""}${kind}`, "aria-hidden": "true" });
const hidden = (text) => make("span.visually-hidden", text);
const sub = (...parts) => make("span.sub", ...parts);

// ---- a refresh changes only what changed: what is there already stays, with its focus, scroll and selection

function show(place, ...fresh) {
  const wanted = fresh.flat().filter(isThere).map((node) => (typeof node === "object" ? node : document.createTextNode(node)));
  const keys = new Set(wanted.map(keyOf).filter(Boolean)), known = new Map([...place.childNodes].filter(keyOf).map((node) => [keyOf(node), node]));
  let here = place.firstChild;
  for (const node of wanted) {
    const key = keyOf(node);
    while (here && (isExtra(here) || (keyOf(here) && !keys.has(keyOf(here))))) here = isExtra(here) ? here.nextSibling : drop(here);
    const old = key ? known.get(key) : here && !keyOf(here) && here.nodeName === node.nodeName ? here : null;
    if (!old) { place.insertBefore(node, here); continue; }
    if (old === here) here = here.nextSibling; else place.insertBefore(old, here);
    renew(old, node);
  }
  while (here) here = isExtra(here) ? here.nextSibling : drop(here);
}
const keyOf = (node) => (node.dataset ? node.dataset.key : undefined);
const isExtra = (node) => node.id === "notice" || (node.dataset && "extra" in node.dataset); // put in by a click
function drop(node) {
  const next = node.nextSibling;
  if (node.contains(at("notice"))) at("content").prepend(at("notice"));
  node.remove();
  return next;
}
function renew(node, fresh) {
  if (node.nodeName !== fresh.nodeName) { node.replaceWith(fresh); return; }
  if (node.nodeType === Node.TEXT_NODE) { if (node.data !== fresh.data) node.data = fresh.data; return; }
  if (node.hasAttribute("data-own")) return; // the reader has it open
  const kept = (name) => name === "style" || (name === "tabindex" && node.classList.contains("cell"));
  for (const { name } of [...node.attributes]) if (!fresh.hasAttribute(name) && !kept(name)) node.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (node.getAttribute(name) !== value && !kept(name)) node.setAttribute(name, value);
  if (node.style.cssText !== fresh.style.cssText) node.style.cssText = fresh.style.cssText; // the attribute is not allowed by the page's policy
  if (node.tagName !== "SELECT" || !node.options.length) show(node, ...fresh.childNodes);
}

// ---- times are local, UTC stands in the title

const pad = (value) => String(value).padStart(2, "0");
const clock = (date, seconds) => `${pad(date.getHours())}:${pad(date.getMinutes())}${seconds ? `:${pad(date.getSeconds())}` : ""}`;
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const day = (date, year) => `${date.getDate()} ${MONTHS[date.getMonth()]}${year ? ` ${date.getFullYear()}` : ""}`;
const weekday = (date) => `${["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"][date.getDay()]} ${day(date)}`;
const utc = (date) => `${date.toISOString().slice(0, 19).replace("T", " ")} UTC`;
const sameDay = (one, other) => one.toDateString() === other.toDateString();
function stamp(date, seconds = true) { return sameDay(date, new Date()) ? clock(date, seconds) : `${day(date)} ${clock(date, seconds)}`; }
function span(seconds) {
  const s = Math.round(Math.abs(seconds));
  if (s < 90) return `${s} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 129600) return `${Math.floor(s / 3600)} h${s < 36000 && Math.round((s % 3600) / 60) ? ` ${Math.round((s % 3600) / 60)} min` : ""}`;
  return `${Math.round(s / 86400)} days`;
}
const when = (text, seconds) => { const date = new Date(text); return make("time", { datetime: text, title: utc(date) }, stamp(date, seconds)); };
const from_to = (from, to) => {
  const [a, b] = [new Date(from), new Date(to)];
  return make("time", { datetime: from, title: `${utc(a)} to ${utc(b)}` }, `${day(a)} ${clock(a)} to ${sameDay(a, b) ? "" : `${day(b)} `}${clock(b)}`);
};
function ago(text, before = "", after = "") { const node = make("time", { datetime: text, title: utc(new Date(text)), "data-ago": `${before}|${after}` }); relate(node); return node; }
function relate(node) {
  const [before, after] = node.dataset.ago.split("|"), date = new Date(node.dateTime), seconds = (Date.now() + skew - date) / 1000;
  const said = document.body.classList.contains("away") ? (after === "next" ? "not known" : stamp(date)) : after === "next" && seconds > -1 ? "due now" : seconds >= 0 ? `${span(seconds)} ago` : `in ${span(seconds)}`;
  const text = `${before}${said}${after === "next" ? "" : after}`;
  if (node.textContent !== text) node.textContent = text;
}
let skew = 0; // how far the server's clock is ahead of this one
setInterval(() => { for (const node of document.querySelectorAll("[data-ago]")) relate(node); }, 1000);

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let step = 0, value = bytes || 0;
  while (value >= 1000 && step < units.length - 1) { value /= 1000; step += 1; }
  return `${step && value < 10 ? value.toFixed(1) : Math.round(value)} ${units[step]}`;
}

// ---- the server

let me = { name: "", scopes: [], keys: false };
const may = (scope) => me.scopes.includes(scope);
async function ask(method, path, body) {
  const options = { method, headers: {}, credentials: "same-origin" };
  if (body !== undefined) { options.headers["Content-Type"] = "application/json"; options.body = JSON.stringify(body); }
  const answer = await fetch(ROOT + path, options);
  const text = await answer.text();
  let data = {};
  try { data = text ? JSON.parse(text) : {}; } catch { data = { text }; }
  if (answer.ok || path === "ready") return Object.defineProperty(data, "headers", { value: answer.headers });
  const said = data.error || { message: `the server answered ${answer.status}`, hint: "" };
  throw Object.assign(new Error(said.message), { status: answer.status, hint: said.hint });
}
const get = (path, query = {}) => {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined && value !== false);
  return ask("GET", given.length ? `${path}?${new URLSearchParams(given)}` : path);
};
const said = (error) => (error instanceof TypeError ? "The server does not answer. Next: look whether the process runs and its port can be reached." : sentence(error.message, error.hint));
const ended = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);
// A first word that is a name stays as it is written: `clusters_1.csv: line 1`, `web: 403`.
const sentence = (text, hint) => (text ? `${ended(text.trim().replace(/^[a-z]+(?= )/, (word) => word[0].toUpperCase() + word.slice(1)))}${hint ? ` Next: ${ended(hint)}` : ""}` : "");

const nextStep = (text) => make("p.quiet.next", make("b", "Next: "), ended(text));

// ---- a notice appears where one clicked and stays until it is dismissed

function notice(kind, text, beside) {
  const box = at("notice"), inside = beside?.closest(".todo > li, .drill");
  if (inside) inside.append(box);
  else if (beside && !box.contains(beside)) (beside.closest("table") || beside.closest(".map > .head, .controls, .head, p, dialog") || beside).after(box);
  box.className = `notice ${kind}`;
  box.hidden = false;
  box.replaceChildren(mark(kind || "ok"), make("div", text), press(".bare", { act: "dismissNotice" }, "Dismiss"));
}

// ---- buttons: one listener, and what each does by its name

const ACTS = {
  dismissNotice: () => { at("notice").hidden = true; },
  closeDialog: (button) => { button.closest("dialog").close(); },
  async signOut() { await ask("DELETE", "ops/session").catch(() => {}); location.reload(); },
  otherKey() { at("few").hidden = true; at("sign-in").hidden = false; at("key").focus(); },
  showKey(button) {
    const shown = at("key").type === "text";
    at("key").type = shown ? "password" : "text";
    button.setAttribute("aria-pressed", String(!shown));
    button.textContent = shown ? "Show" : "Hide";
  },
  async copy(button) {
    const text = button.dataset.text || at(button.dataset.copy).textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { if (button.dataset.copy) getSelection().selectAllChildren(at(button.dataset.copy)); button.textContent = "Press Ctrl+C"; }
  },
  menu(button) { const box = button.parentNode; box.hasAttribute("data-own") ? closeMenu(box, true) : openMenu(box); },
};
document.addEventListener("click", async (event) => {
  for (const open of document.querySelectorAll(".menu[data-own]")) if (!open.contains(event.target)) closeMenu(open, false);
  const button = event.target.closest("[data-act]");
  if (!button || button.disabled || !ACTS[button.dataset.act]) return;
  const box = button.closest(".menu");
  if (box && button.dataset.act !== "menu") closeMenu(box, true);
  try { await ACTS[button.dataset.act](button); } catch (error) { notice("bad", said(error), button); }
});
// A menu: Enter or Down opens, arrows move, Escape closes and gives the focus back.
function menu(label, entries) {
  const items = entries.filter(Boolean).map(([text, data, rule]) => make("li", { role: "none", class: rule && "rule" }, make("button", { role: "menuitem", type: "button", tabindex: "-1", data }, text)));
  return make("div.menu", make("button.button.bare", { type: "button", "aria-haspopup": "menu", "aria-expanded": "false", "aria-label": label, "data-act": "menu" }, "⋯"), make("ul", { role: "menu", "aria-label": label, hidden: true }, ...items));
}
function openMenu(box) {
  box.setAttribute("data-own", "");
  box.querySelector("ul").hidden = false;
  box.firstChild.setAttribute("aria-expanded", "true");
  box.querySelector("ul button:not(:disabled)")?.focus();
}
function closeMenu(box, back) {
  box.removeAttribute("data-own");
  box.querySelector("ul").hidden = true;
  box.firstChild.setAttribute("aria-expanded", "false");
  if (back) box.firstChild.focus();
}
document.addEventListener("keydown", (event) => {
  const box = event.target.closest?.(".menu");
  if (!box) return;
  const all = [...box.querySelectorAll("ul button:not(:disabled)")], here = all.indexOf(document.activeElement);
  if (here < 0) { if (event.key === "ArrowDown") { event.preventDefault(); openMenu(box); } return; }
  const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: -1 }[event.key];
  if (to !== undefined) { event.preventDefault(); all.at(to % all.length).focus(); }
  if (event.key === "Escape") closeMenu(box, true);
  if (event.key === "Tab") closeMenu(box, false);
});
function lockActions() {
  const away = document.body.classList.contains("away");
  for (const button of document.querySelectorAll("[data-needs]")) {
    const refused = away || !may(button.dataset.needs);
    if (refused) { button.disabled = true; button.title = away ? "The server does not answer" : `Needs a key with the scope ${button.dataset.needs}`; } else if (button.title.startsWith("Needs") || button.title.startsWith("The server")) { button.disabled = false; button.removeAttribute("title"); }
  }
}

// ---- signing in, few rights, the server away

function only(id) { for (const each of ["sign-in", "few", "board"]) at(each).hidden = each !== id; }
function signedOut() {
  if (at("sign-in").hidden) { only("sign-in"); document.title = "Sign in – Headwater"; at("key").focus(); }
  at("sign-out").hidden = true;
  at("who").textContent = at("fresh").textContent = "";
}
function fewRights(scope, other, label) {
  only("few");
  document.title = "Signed in – Headwater";
  at("few-title").textContent = `Signed in as ${me.name}, but this key may not see this page.`;
  at("few-more").textContent = `It needs the scope ${scope}. This key has ${me.scopes.join(", ")}.`;
  at("few-open").href = ROOT + other;
  at("few-open").textContent = label;
}
at("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("sign-in-error").textContent = "";
  try {
    await ask("POST", "ops/session", { key: at("key").value.trim() });
    at("key").value = "";
    at("sign-in").hidden = true;
    await turn();
  } catch (error) { at("sign-in-error").textContent = error.status === 401 ? "This key is not known here. Check that it is complete and was made for this server." : said(error); at("key").focus(); }
});
let lostAt = 0, answeredAt = Date.now(), failures = 0, before = {};
function away(error) {
  failures += 1;
  if (failures < 2 && at("board").hidden === false) return;
  if (!lostAt) {
    lostAt = answeredAt;
    before = { title: document.title, icon: icon() };
    document.body.classList.add("away");
    only("board");
    for (const node of document.querySelectorAll("[data-ago]")) relate(node);
  }
  const text = `No answer from the server since ${stamp(new Date(lostAt), false)} (${span((Date.now() - lostAt) / 1000)}).`;
  at("fresh").textContent = `As of ${stamp(new Date(lostAt), false)}`;
  document.title = "Server away – Headwater";
  icon("away");
  saidAway(text, error);
  lockActions();
}
function saidAway(text) { if (at("verdict")) verdict("away", [text], "Below is what was known then. Trying again every 5 s. If it stays away: is the process running, and is its port reachable?", null); else notice("warn", text); }
function back() {
  failures = 0;
  answeredAt = Date.now();
  if (!lostAt) return;
  lostAt = 0;
  document.body.classList.remove("away");
  document.title = before.title;
  icon(before.icon);
}
function icon(kind) {
  const link = document.querySelector("link[rel=icon]");
  if (kind && link.dataset.kind !== kind) { link.dataset.kind = kind; link.href = `${ROOT}assets/icon-${kind}.svg`; }
  return link.dataset.kind;
}
function verdict(kind, parts, more, title) {
  const state = at("verdict-mark");
  state.className = `mark large ${kind}`;
  show(at("verdict"), ...parts);
  show(at("verdict-more"), ...[more].flat());
  if (title) { document.title = `${title} – Headwater`; icon({ ok: "ok", run: "ok", paused: "ok", off: "away", away: "away" }[kind] || "bad"); }
}

// ---- a page begins: `page.refresh` is called again and again while it is looked at

let page = {};
let timer = 0, turning = false;
async function turn() {
  clearTimeout(timer);
  if (!document.hidden && !turning && at("sign-in").hidden) {
    turning = true;
    try {
      me = await get("ops/session");
      at("who").textContent = me.keys ? (may("ops:run") ? me.name : `${me.name}, read-only key`) : "";
      at("sign-out").hidden = !me.keys;
      back();
      if (!may(page.scope)) fewRights(page.scope, page.other[0], page.other[1]);
      else {
        if (at("board").hidden) only("board");
        await page.refresh();
        await showChecks();
        if (page.scope === "ops:read" && page.every) at("fresh").replaceChildren(ago(new Date(Date.now() + skew).toISOString(), "Updated "));
        lockActions();
      }
    } catch (error) {
      if (error.status === 401) signedOut();
      else if (error instanceof TypeError || error.status >= 502) away(error);
      else { back(); notice("bad", said(error)); }
    } finally { turning = false; }
  }
  if (page.every) timer = setTimeout(turn, failures ? 5000 : page.every);
}
function begin(given) {
  page = { scope: "ops:read", other: ["analytics/explore", "Open Explore"], every: 5000, ...given };
  document.addEventListener("visibilitychange", () => { if (!document.hidden) turn(); });
  turn();
}
async function showChecks() {
  const [ready, health] = await Promise.all([get("ready"), get("health")]);
  const names = { worker_running: ["Worker running", "Worker stopped"], checkpoint_store_connected: ["State database connected", "State database away"], s3_accessible: ["Object store reachable", "Object store away"], dwh_connected: ["Warehouse connected", "Warehouse away"] };
  show(at("checks"), ...Object.entries(ready.checks || {}).map(([name, ok]) => make("span", { class: `health ${ok ? "" : "text-bad"}`, title: (ready.notes || {})[name] }, `${(names[name] || [name, `${name}: no`])[ok ? 0 : 1]} `)));
  at("version").textContent = `Headwater ${health.version || ""}`;
}

// ---- the view is in the address, so that a link reproduces it

const view = new URLSearchParams(location.search);
function keep(values) {
  for (const [name, value] of Object.entries(values)) if (value === "" || value === null || value === undefined || value === false) view.delete(name); else view.set(name, value);
  history.replaceState(null, "", `${location.pathname}${view.size ? `?${view}` : ""}${location.hash}`);
}
