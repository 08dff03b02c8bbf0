"""The summary: one sentence on whether everything arrived, what to do about problems, and one row per pipeline.

Invariants: the worst problem comes first and sets the colour; each problem names its subject, count and next step. A
problem that would end only with time can be dismissed; any other ends when it is fixed.
"""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from app.core.pipeline import MISSING, NEVER_AFTER, QUIET_AFTER, USUAL_HOURS
from app.core.runs import Outcome, Run
from app.core.verify import Verdict
from app.core.windows import Window, instant_text
from app.db.page_queries import PageQuerySession
from app.ops.delivery_map import WORDS, MapCells, cells_of_span
from app.ops.json_views import run_shown, view_shown
from app.ops.scheduler import JobView

if TYPE_CHECKING:
    from app.ops.service import BuiltService

NAMED = 3  # problems that the sentence names
LISTED = 50
MOST_PARTITIONS = 1000
HEALED_TOGETHER = timedelta(hours=24)  # over all partitions: a longer span would re-read too much
RECENT = timedelta(hours=24)
LATE_SECONDS = 60.0
HISTORY = 300
VARIABLE = re.compile(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b")
FAULTS = {"m": "missing", "p": "partial", "c": "changed"}
WINDOW_WORDS = {kind: WORDS[letter] for letter, kind in FAULTS.items()}
KINDS: Mapping[str, tuple[str, str, str]] = {
    "unreachable": ("bad", "{title}", "Unreachable"),
    "unaccounted": ("bad", "{count} of {job} {are} unaccounted for", "{count} unaccounted for"),
    "failed": ("bad", "{job} failed {times}", "Failed {times}"),
    **{
        kind: ("bad", f"{{count}} {{are}} {words} in {{job}}", f"{{count}} {words.removesuffix(' at the destination')}")
        for kind, words in WINDOW_WORDS.items()
    },
    "late": ("late", "{title}", "Late"),
    "clock": ("late", "{title}", "Clock ahead"),
    "set_aside": ("warn", "{count} {were} set aside", "{count} set aside"),
    "quiet": ("warn", "{title}", "No rows"),
}
"""The worst first: mark, words in the sentence, and words in the row of a pipeline."""
HEAL = "heal: Headwater reads these windows again from the source and writes what is missing; nothing else is touched"
RERUN = "run the job again; if the gap stays, report it with the log of this run"
LATE_HINT = "look at the log of its last run; if nothing moves, restart Headwater. Nothing is lost at the source"
FILE_HINT = "correct the file and put it into the inbox again"
ASIDE_HINT = (
    "correct these rows at the source, then backfill their windows; until then they stay where they were set aside"
)
DISMISS = {"kind": "dismiss", "label": "Dismiss"}
QUIET = "The service responds, but returns no rows."
QUIET_HINT = "check that it is the right project or application, in the right region, and that events reach it"
CLOCK_HINT = "check the clocks of the machines; the next good run sets its own time right"


SHOWN = ("kind", "mark", "job", "partition", "title", "count", "message", "next")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that did not arrive, or may not. `count` is in units of `noun`; `title` does not mention the time."""

    kind: str
    job: str
    title: str
    message: str
    next: str
    count: int = 1
    noun: str = "window"
    partition: str = ""
    span: tuple[datetime, datetime] | None = None
    since: datetime | None = None
    actions: Sequence[Mapping[str, Any]] = ()
    about: str = ""

    @property
    def problem_id(self) -> str:
        """Stable for the same problem, whatever its count."""
        return _id_of(self.kind, self.job, self.about, self.partition)

    @property
    def mark(self) -> str:
        """The status mark: bad, late or warn."""
        return KINDS[self.kind][0]

    def to_json(self) -> Mapping[str, Any]:
        """The problem as the API returns it."""
        start, end = self.span or (None, None)
        return {
            "id": self.problem_id,
            **{name: getattr(self, name) for name in SHOWN},
            "from": instant_text(start),
            "to": instant_text(end),
            "since": instant_text(self.since),
            "actions": list(self.actions),
        }


def _id_of(kind: str, job: str, about: str, partition: str = "") -> str:
    text = f"{kind}\x1f{job}\x1f{partition}\x1f{about}"
    return blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


class RunsOfJob(NamedTuple):
    """The newest run of a job, its newest ended run, how often it failed since its last good run, and since when."""

    newest: Run | None = None
    ended: Run | None = None
    failures: int = 0
    failing_since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state at one moment, in one time zone. `cells` are the hours of the last day; `runs` are by job; `histories`
    are files by job, newest first.
    """

    now: datetime
    zone: tzinfo
    views: Sequence[JobView]
    look: PageQuerySession
    cells: MapCells
    ops: "BuiltService"
    runs: Mapping[str, RunsOfJob] = field(default_factory=dict)
    histories: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def on(self) -> Sequence[JobView]:
        """Jobs that can run."""
        return [view for view in self.views if not view.job.off]

    def midnight(self, at: datetime) -> datetime:
        """The beginning of the day of `at`."""
        return at.astimezone(self.zone).replace(hour=0, minute=0, second=0, microsecond=0).astimezone(UTC)


@contextmanager
def snapshot(ops: "BuiltService", zone: tzinfo) -> Iterator[Snapshot]:
    """The current state, read in one transaction."""
    now, views = ops.clock(), ops.scheduler.views()
    histories = {name: lines(HISTORY) for name, lines in ops.pipelines.histories.items()}
    with ops.state.pages.look() as look:
        runs = {
            view.job.name: RunsOfJob(
                *look.last_runs(view.job.name),
                *((0, None) if view.job.off else look.failures_in_a_row(view.job.name)),
            )
            for view in views
        }
        yield Snapshot(now, zone, views, look, cells_of_span("24h", None, zone, now), ops, runs, histories)


def file_address(run_id: str, name: str) -> str:
    """The path of a file that a run set aside on this machine, relative to the root of the pages."""
    return f"ops/runs/{run_id}/set-aside/file?name={quote(name, safe='')}"


def join_words(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def count_text(count: int, noun: str) -> str:
    """`1 window`, `2,000 windows`."""
    one = noun.removesuffix("s")
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


# ---- problems


def problems_of(seen: Snapshot) -> Sequence[Problem]:
    """All problems, worst first."""
    unreachable = seen.ops.probes.unreachable().items()
    found = [
        *(
            Problem("unreachable", "", f"{name} cannot be reached", error, hint, noun="system", about=name)
            for name, (error, hint) in unreachable
        ),
        *_failing(seen),
        *_windows(seen),
        *_late(seen),
        *_set_aside(seen),
        *_quiet(seen),
    ]
    rank = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(found, key=lambda each: (rank[each.kind], each.job, -each.count, each.partition))


def _failing(seen: Snapshot) -> Iterator[Problem]:
    for view in seen.on:
        name = view.job.name
        _, last, runs, since = seen.runs[name]
        if last is None:
            continue
        opened = {"kind": "open", "label": "Open last run", "href": f"run?id={last.run_id}"}
        gap = last.report.ledger.gap
        if gap:
            unit = last.report.ledger.unit
            title = f"{name}: {count_text(gap, unit)} unaccounted for"
            yield Problem("unaccounted", name, title, last.error, last.hint or RERUN, gap, unit, actions=[opened])
        failures = last.report.failures
        rejected = {entry["file"] for entry in seen.histories.get(name, ()) if entry["outcome"] == "rejected"}
        if not runs or (failures and all(each.partition in rejected for each in failures)):
            continue  # set-aside files have their own problem
        partition = failures[0].partition if len(failures) == 1 else ""
        of = f"{name}, {partition}" if partition else name
        more = f" ({len(failures)} partitions)" if len(failures) > 1 else ""
        message = failures[0].message if partition else last.error
        yield Problem(
            "failed",
            name,
            f"{of}: failed {_times(runs)}{more}",
            message,
            last.hint,
            runs,
            "time",
            partition,
            since=since,
            actions=[opened, {"kind": "run", "label": "Run now", "job": name}],
        )


def _windows(seen: Snapshot) -> Iterator[Problem]:
    """Windows that differ from what was delivered: marked in the state, or found by the last listing or
    verification. All partitions of a job with the same fault are one problem.
    """
    found: dict[tuple[str, str], dict[str, set[Window]]] = defaultdict(lambda: defaultdict(set))
    since: dict[tuple[str, str], datetime] = {}
    for job in seen.ops.maps.jobs:
        for fault in seen.ops.maps.faults(job):
            what = job, FAULTS[fault.letter]
            found[what][fault.partition].add(fault.window)
            since[what] = min(since.get(what, seen.now), fault.seen_at)
    for result in seen.ops.proofs.results():
        for verdict in result.windows:
            if verdict.sign is not Verdict.ERROR and not verdict.healed:
                kind = "missing" if verdict.sign is Verdict.MISSING else "changed"
                found[result.job, kind][verdict.slot.partition].add(verdict.slot.window)
    marked: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in seen.look.rows("trouble_by_partition", limit=MOST_PARTITIONS):
        what = row["pipeline"], "missing" if row["trouble"] == MISSING else "changed"
        marked[what].append(row)
        found[what].pop(row["device_id"], None)
    for what, windows in found.items():
        rows = marked[what]
        counts = {name: len(some) for name, some in windows.items()}
        counts |= {row["device_id"]: row["windows"] for row in rows}
        spans = [(window.start, window.end) for some in windows.values() for window in some]
        spans += [(row["all_first_at"], row["all_last_at"]) for row in rows[:1]]
        span = min(start for start, _ in spans), max(end for _, end in spans)
        unlisted = sum(row["all_windows"] for row in rows[:1]) - sum(row["windows"] for row in rows)
        number = len(counts) + sum(row["all_partitions"] for row in rows[:1]) - len(rows)
        count, seen_at = sum(counts.values()) + unlisted, since.get(what)
        yield _of_windows(seen, *what, counts, count=count, number=number, span=span, since=seen_at)


def _of_windows(
    seen: Snapshot,
    job: str,
    kind: str,
    counts: Mapping[str, int],
    *,
    count: int,
    number: int,
    span: tuple[datetime, datetime],
    since: datetime | None,
) -> Problem:
    """`counts`: faulty windows by partition; those with the most are named. `count` and `number`: windows and
    partitions, also those beyond the limit.
    """
    names = sorted(counts, key=lambda name: (-counts[name], name))[:NAMED]
    partition = names[0] if number == 1 else ""
    names += [f"{number - NAMED:,} more"] if number > NAMED else []
    actions: list[Mapping[str, Any]] = [{"kind": "show", "label": "Show on map", "href": f"#map-{job}"}]
    first, last = (f"{at:%Y-%m-%d}" for at in (span[0], span[1] + timedelta(days=1)))
    hint = f"heal them on the map, or all at once: python -m app verify {job} --from {first} --to {last} --heal"
    if job in seen.ops.proofs.jobs and (partition or span[1] - span[0] <= HEALED_TOGETHER):
        part = {"from": instant_text(span[0]), "to": instant_text(span[1])}
        part |= {"partition": partition} if partition else {}
        label = f"Heal {count_text(count, 'window')}"
        actions.insert(0, {"kind": "heal", "label": label, "job": job, "part": part})
        hint = HEAL
    message = "Delivered once, and not at the destination any more."
    if kind != "missing":
        message = "What is at the destination is not what was delivered."
    title = f"{job}, {join_words(names)}: {count_text(count, 'window')} {WINDOW_WORDS[kind]}"
    return Problem(kind, job, title, message, hint, count, "window", partition, span, since, actions)


def _late(seen: Snapshot) -> Iterator[Problem]:
    for view in seen.on:
        name = view.job.name
        if name in seen.ops.alerts.ahead_seconds:
            seconds = seen.ops.alerts.ahead_seconds[name]
            message = f"Its last run or one of its cursors lies {seconds:,.0f} s ahead of now."
            yield Problem("clock", name, f"{name}: its records lie ahead of now", message, CLOCK_HINT, noun="record")
        due = view.next_run_at
        slack = timedelta(seconds=max(view.job.interval_seconds, LATE_SECONDS))
        overdue = view.state == "waiting" and due is not None and due + slack < seen.now
        if name in seen.ops.alerts.stale or overdue:
            message = "No run finished in time."
            actions = [{"kind": "run", "label": "Run now", "job": name}]
            yield Problem("late", name, f"{name} is late", message, LATE_HINT, noun="run", since=due, actions=actions)


def _set_aside(seen: Snapshot) -> Iterator[Problem]:
    """Set-aside rows by reason and files by their error, from the last day and not dismissed."""
    dismissed = {row["problem_id"]: row["dismissed_at"] for row in seen.look.rows("dismissed")}

    def limit(job: str, about: str) -> datetime:
        at: datetime = dismissed.get(_id_of("set_aside", job, about), seen.now - RECENT)
        return at

    rows: dict[tuple[str, str], list[tuple[Run, int, str]]] = defaultdict(list)
    hints: dict[str, str] = {}
    for run in seen.look.partial_runs(seen.now - RECENT):  # newest first: the latest hint for a file wins
        if run.job in seen.histories:
            hints = {each.partition: each.hint for each in run.report.failures} | hints
            continue
        for one in run.report.ledger.newly_set_aside:
            if run.started_at > limit(run.job, one.reason):
                rows[run.job, one.reason].append((run, one.new, one.sample))
    for (job, reason), runs in rows.items():
        yield _rows_aside(job, reason, runs)
    for job, entries in seen.histories.items():
        yield from _files_aside(job, entries, hints, limit)


def _quiet(seen: Snapshot) -> Iterator[Problem]:
    """No product events: with the wrong project, a service answers as if nothing had happened there."""
    on = {view.job.name for view in seen.on}
    for row in seen.look.rows(
        "quiet_partitions", never=NEVER_AFTER // timedelta(hours=1), quiet_at=seen.now - QUIET_AFTER, usual=USUAL_HOURS
    ):
        name = row["pipeline"]
        if name in on:
            title, since = f"{name}, {row['device_id']}: no rows", row["last_at"] or row["first_at"]
            yield Problem(
                "quiet", name, title, QUIET, QUIET_HINT, partition=row["device_id"], noun="source", since=since
            )


def _rows_aside(job: str, reason: str, runs: Sequence[tuple[Run, int, str]]) -> Problem:
    run, _, sample = runs[0]
    count, unit = sum(number for _, number, _ in runs), run.report.ledger.unit
    actions = [{"kind": "open", "label": "Open the run", "href": f"run?id={run.run_id}"}, DISMISS]
    title, since = f"{job}: {count_text(count, unit)} set aside", runs[-1][0].started_at
    text = f"{reason}{f', for example {sample}' if sample else ''}."
    return Problem("set_aside", job, title, text, ASIDE_HINT, count, unit, since=since, actions=actions, about=reason)


def _files_aside(
    job: str, entries: Sequence[Mapping[str, Any]], hints: Mapping[str, str], limit: Callable[[str, str], datetime]
) -> Iterator[Problem]:
    """The latest entry of a file counts: one that was merged since is not a problem."""
    latest = {entry["file"]: entry for entry in reversed(entries)}
    files: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in entries:
        is_new = datetime.fromisoformat(entry["at"]) > limit(job, entry["error"])
        if entry is latest[entry["file"]] and entry["outcome"] == "rejected" and is_new:
            files[entry["error"]].append(entry)
    for error, some in files.items():
        count, name, run_id = len(some), some[0]["file"], some[0]["run_id"]
        title = f"{job}: {name} was set aside"
        if count > 1:
            title = f"{job}: {count_text(count, 'file')} were set aside, the latest is {name}"
        hint, since = hints.get(name) or FILE_HINT, datetime.fromisoformat(some[0]["at"])
        href = file_address(run_id, name)
        actions = [{"kind": "open", "label": "Download file", "href": href, "needs": "ops:run"}, DISMISS]
        yield Problem("set_aside", job, title, error, hint, count, "file", since=since, actions=actions, about=error)


# ---- the sentence


def verdict_of(seen: Snapshot, problems: Sequence[Problem], complete_up_to: datetime | None) -> Mapping[str, Any]:
    """State, sentence in parts with links, and title. Names at most three problems."""
    parts = _parts(problems)
    pipelines = [view for view in seen.on if not view.job.helper_of]
    paused = [view.job.name for view in pipelines if view.state == "paused"]
    more = [f"{join_words(paused)} {'is' if len(paused) == 1 else 'are'} paused."] if paused else []
    if problems:
        title = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        mark = problems[0].mark if problems[0].mark != "late" else "warn"
        return {"state": mark, "title": title, "parts": parts, "more": " ".join(more)}
    state, title, text = "off", "Nothing set up yet", "Headwater is running. No source is set up yet."
    if not [view for view in pipelines if view.job.name not in seen.histories]:
        more = []
    elif not any(seen.runs[view.job.name].newest for view in pipelines):
        title, text = "Starting", "Headwater is running. No run has ended yet."
    else:
        number = sum(row["partitions"] for row in seen.look.rows("partition_totals"))
        more.insert(0, f"{count_text(len(pipelines), 'pipeline')}, {count_text(number, 'partition')}.")
        state, title, text = "ok", "All delivered", "Everything delivered"
    said = {"state": state, "title": title, "parts": [{"text": text, "href": ""}], "more": " ".join(more)}
    return {**said, "complete": complete_up_to is not None} if state == "ok" else said


def _parts(problems: Iterable[Problem]) -> Sequence[Mapping[str, str]]:
    groups: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[problem.kind, problem.job or problem.title].append(problem)
    parts = []
    for (kind, _), some in list(groups.items())[:NAMED]:
        job = some[0].job
        href = f"#map-{job}" if kind in WINDOW_WORDS else f"#p-{job}" if job else "#todo"
        parts.append({"text": _phrase(some), "href": href})
    rest = sum(len(some) for some in list(groups.values())[NAMED:])
    return parts + ([{"text": f"{rest} more", "href": "#todo"}] if rest else [])


def _phrase(some: Sequence[Problem], *, in_row: bool = False) -> str:
    """Problems of one kind and job in a few words."""
    first, count = some[0], sum(each.count for each in some)
    _, sentence, row = KINDS[first.kind]
    counted = count_text(count, first.noun)
    if first.kind == "set_aside" and first.noun != "file" and not in_row:
        counted += f" of {first.job}"
    is_one = count == 1
    return (row if in_row else sentence).format(
        title=first.title,
        job=first.job,
        count=counted,
        are="is" if is_one else "are",
        were="was" if is_one else "were",
        times=_times(count),
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


# ---- the rows


def summary_of(seen: Snapshot, strips: Mapping[str, str | None]) -> dict[str, Any]:
    """The response of /ops/summary. `strips`: the map of each pipeline that has one, in one row for the last day."""
    problems = problems_of(seen)
    totals = {row["pipeline"]: row for row in seen.look.rows("partition_totals")}
    paused = {row["job"]: row for row in seen.look.rows("paused")}
    news = _news(seen)
    on = {view.job.name for view in seen.on}
    complete_up_to = min((row["slowest_at"] for name, row in totals.items() if name in on), default=None)
    bill = seen.ops.costs.estimate()
    ended = [result.ended_at for result in seen.ops.proofs.results() if result.equal is not None]
    return {
        "now": instant_text(seen.now),
        "verdict": verdict_of(seen, problems, complete_up_to),
        "complete_up_to": instant_text(complete_up_to),
        "checked_at": instant_text(max(ended, default=None)),  # type: ignore[type-var]  # none of them is None
        "problems": [problem.to_json() for problem in problems[:LISTED]],
        "problems_total": len(problems),
        "bill": bill.text() if bill.by_kind else None,
        "day_starts_at": instant_text(seen.midnight(seen.now)),
        "hours_start_at": instant_text(seen.cells.edges[0]),
        "jobs": [
            {
                **_row(seen, view, problems, totals.get(view.job.name, {}), paused.get(view.job.name, {})),
                "new_rows": news.get(view.job.name),
                "strip": _strip(seen, view, strips, news.get(view.job.name)),
            }
            for view in seen.views
        ],
    }


def _news(seen: Snapshot) -> Mapping[str, Mapping[str, Any]]:
    """New rows by job: today, yesterday, and by hour of the last day."""
    cells, today = seen.cells, seen.midnight(seen.now)
    yesterday = seen.midnight(today - timedelta(hours=2))
    found: dict[str, Any] = {}
    for row in seen.look.rows("new_rows_since", since_at=min(yesterday, cells.edges[0]), until_at=cells.edges[-1]):
        empty = {"today": 0, "yesterday": 0, "updated_today": 0, "by_hour": [0] * 24, "failed_hours": []}
        of = found.setdefault(row["job"], empty)
        at = row["slot_at"]
        if at >= today:
            of["today"] += row["new_rows"]
            of["updated_today"] += row["updated_rows"]
        elif at >= yesterday:
            of["yesterday"] += row["new_rows"]
        if at >= cells.edges[0]:
            hour = bisect_right(cells.edges, at) - 1
            of["by_hour"][hour] += row["new_rows"]
            if row["failed_runs"] and hour not in of["failed_hours"]:
                of["failed_hours"].append(hour)
    return found


def _row(
    seen: Snapshot,
    view: JobView,
    problems: Sequence[Problem],
    total: Mapping[str, Any],
    paused: Mapping[str, Any],
) -> Mapping[str, Any]:
    """`total` and `paused` are empty for a job without partitions or pause."""
    job, files = view.job, seen.histories.get(view.job.name)
    served = {each.job.name for each in seen.views if each.job.helper_of == job.name} | {job.name}
    last, ended, runs, since = seen.runs[job.name]
    mark, words = _state(view, [problem for problem in problems if problem.job in served])
    oldest = total.get("oldest_at")
    off = {"text": job.off, "variables": VARIABLE.findall(job.off), "guide": f"guides/{job.name}"}
    return {
        **view_shown(view),
        "mark": mark,
        "words": words,
        "off": off if job.off else None,
        "can_verify": job.name in seen.ops.proofs.jobs and not job.off,
        "has_map": job.name in seen.ops.maps.jobs and not job.off,
        "partitions": total.get("partitions", 0),
        "max_lag_seconds": max((seen.now - oldest).total_seconds(), 0.0) if oldest else None,
        "failures_in_a_row": runs,
        "failing_since": instant_text(since),
        "paused_by": paused.get("paused_by"),
        "paused_at": instant_text(paused.get("paused_at")),
        "files_today": None if files is None else _files_today(seen, files),
        "last_run": last and run_shown(ended if ended and last.outcome is Outcome.RUNNING else last),
    }


def _files_today(seen: Snapshot, entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Files merged and set aside today; `more`: only the latest were counted."""
    today = seen.midnight(seen.now)
    outcomes = [entry["outcome"] for entry in entries if datetime.fromisoformat(entry["at"]) >= today]
    counts = {"merged": outcomes.count("merged"), "set_aside": outcomes.count("rejected")}
    return {**counts, "total": len(outcomes), "more": len(outcomes) == HISTORY}


def _state(view: JobView, own: Sequence[Problem]) -> tuple[str, str]:
    """Mark and words of a pipeline: problems take precedence over running or paused."""
    if view.job.off:
        return "off", "Off"
    if own:
        worst = own[0]
        same = [problem for problem in own if problem.kind == worst.kind and problem.job == worst.job]
        return worst.mark, _phrase(same, in_row=True)
    return {
        "paused": ("paused", "Paused"),
        "running": ("run", "Running"),
        "backfill": ("run", "Backfilling"),
    }.get(view.state, ("ok", "OK"))


def _strip(
    seen: Snapshot, view: JobView, strips: Mapping[str, str | None], news: Mapping[str, Any] | None
) -> str | None:
    """The last day, one letter per hour. Without a map it shows files, and hours with new rows."""
    name, cells = view.job.name, seen.cells
    if view.job.off or view.job.helper_of or name in strips:
        return strips.get(name)
    letters = {"merged": "k", "rejected": "s"}
    entries = [(datetime.fromisoformat(entry["at"]), entry["outcome"]) for entry in seen.histories.get(name, ())]
    files = [(at, at + timedelta(seconds=1), letters.get(outcome, "n")) for at, outcome in entries]
    hours = list(zip(cells.edges, cells.edges[1:], strict=False))
    there = [(*hours[place], "k") for place, rows in enumerate(news["by_hour"] if news else ()) if rows]
    return cells.paint((each for each in (*there, *files) if each[0] >= cells.edges[0]), seen.now)
