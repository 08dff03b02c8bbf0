"""Jobs as markup: what the page shows before its script has asked, and all that it shows without one.

Invariant: whatever comes from data is escaped; the classes are those that the script gives its own cards.
"""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

WORDS = {"backfill": "backfilling"}


def cards(overview: Mapping[str, Any]) -> str:
    """A card per job of `routes.overview`, as it is at that moment."""
    return "".join("".join(_card(job)) for job in overview["jobs"])


def _card(job: Mapping[str, Any]) -> Iterator[str]:
    last = job["last_run"]
    state = last["outcome"] if job["state"] == "waiting" and last else job["state"]
    badge = "stale" if job["stale"] else state
    yield f'<article class="card job"><div class="head"><h3>{escape(job["name"])}</h3>'
    yield f'<span class="badge {escape(badge)}">{escape(WORDS.get(badge, badge))}</span></div>'
    if job["state"] == "off":
        yield f'<p class="quiet">Off: {escape(job["off"])}</p></article>'
        return
    yield "<dl>"
    yield from (f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in _facts(job))
    yield "</dl>"
    if last and last["error"]:
        hint = f'<p class="hint quiet">{escape(last["hint"])}</p>' if last["hint"] else ""
        mild = "" if last["outcome"] == "failed" else " mild"
        yield f'<div class="trouble{mild}"><p>{escape(last["error"])}</p>{hint}</div>'
    yield "</article>"


def _facts(job: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    last, calls = job["last_run"], job["calls"]
    yield "Every", f"{job['interval_seconds']:,} s"
    yield "Last run", f"{_clock(last['started_at'])}, {last['rows']:,} rows" if last else "none yet"
    if last and last["ledger_text"]:
        yield "Ledger", last["ledger_text"]
    yield "Next run", _clock(job["next_run_at"]) if job["next_run_at"] else "when resumed"
    if job["clock_ahead_seconds"]:
        yield "Clock", f"records lie {job['clock_ahead_seconds']:,.0f} s ahead of now"
    if job["rows_total"]:
        yield "Moved", f"{job['rows_total']:,} rows in {job['runs_total']:,} runs"
    if calls:
        yield "Calls", f"{calls['today']:,} of {calls['a_day']:,} today"


def _clock(text: str) -> str:
    """`2026-02-07 12:00:00Z` of an instant as the API writes it."""
    return f"{text[:10]} {text[11:19]}Z"
