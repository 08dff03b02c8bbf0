"""The routes behind the pages: the summary, the delivery map, one run with its log, and dismissals."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import MAXYEAR, MINYEAR, UTC, datetime, tzinfo
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse
from pydantic import AfterValidator, AwareDatetime

from app.core.ledger import KeptFile
from app.core.pipeline import MISSING
from app.core.runs import Run
from app.core.windows import Window, instant_text, whole_second
from app.db.page_queries import NameFilter
from app.ops.delivery_map import MOST_DAYS, WORDS, DeliveryMap, MapCells, cells_between, cells_of_span, letter_of
from app.ops.json_views import (
    KEPT,
    LOG,
    MAP,
    MAP_WINDOWS,
    RUN_DETAIL,
    SUMMARY,
    answered_with,
    run_shown,
)
from app.ops.service import BuiltService
from app.ops.summary import file_address, problems_of, snapshot, summary_of
from app.web.api import refuse_unknown_parameters
from app.web.auth import needs
from app.web.errors import Refused, faults

READ = needs("ops:read")
RUN = needs("ops:run")
ROWS_A_PAGE = 200
WINDOW_DAYS = 2
LOG_LINES = 500
KEPT_FILES = 100
LEVELS = {"debug": 0, "info": 1, "warn": 2, "error": 3}
NO_LOG = "no line of this run is in the log file: it was rotated away, another process wrote it, or LOG_FORMAT is text"

Zone = Annotated[str, Query(max_length=64, description="An IANA time zone, in which days begin.")]
JobName = Annotated[str, Query(max_length=100, examples=["influx_to_s3", "csv_inbox"])]


def _in_utc(at: datetime) -> datetime:
    try:
        return at.astimezone(UTC)
    except OverflowError:  # an offset at the limits of the datetime range
        raise ValueError("the timestamp is out of range") from None


Instant = Annotated[AwareDatetime, AfterValidator(_in_utc)]
"""A timestamp in a request, in UTC."""


def build(ops: BuiltService) -> APIRouter:
    """All routes of this module."""
    router = APIRouter(tags=["ops"], dependencies=[Depends(refuse_unknown_parameters)])
    _summary(router, ops)
    _map(router, ops)
    _map_windows(router, ops)
    _run(router, ops)
    _kept(router, ops)
    return router


def zone_of(name: str) -> tzinfo:
    """The time zone of this name. Refuses an unknown one."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        hint = "send an IANA name such as Europe/Berlin, or UTC"
        raise Refused(422, f"the time zone {name[:40]!r} is not known", hint, "query.tz") from None


def _summary(router: APIRouter, ops: BuiltService) -> None:
    @router.get(
        "/ops/summary",
        openapi_extra=READ,
        summary="Whether everything arrived, what to do about what did not, and each pipeline",
        responses=answered_with(SUMMARY, "verdict, problems and pipelines"),
    )
    def summary(tz: Zone = "UTC") -> dict[str, Any]:
        zone, now = zone_of(tz), ops.clock()
        cells, on = cells_of_span("24h", None, zone, now), {job.name for job in ops.pipelines.jobs if not job.off}
        strips = {name: ops.maps.strip(name, cells, wait_seconds=1.0) for name in ops.maps.jobs if name in on}
        with snapshot(ops, zone) as seen:
            found = summary_of(seen, strips)
        if ops.scheduler.elsewhere:
            found["scale"] = asdict(ops.scheduler.elsewhere.look())
        return found

    @router.post(
        "/ops/problems/{problem_id}/dismiss",
        openapi_extra=RUN,
        summary="Dismiss a problem",
        responses=faults({404: "there is no such problem", 409: "only what was set aside can be dismissed"}),
    )
    def dismiss(problem_id: str, request: Request) -> dict[str, Any]:
        with snapshot(ops, UTC) as seen:
            found = next((each for each in problems_of(seen) if each.problem_id == problem_id), None)
        if found is None:
            raise Refused(404, f"no problem has the id {problem_id[:40]!r}", "look at /ops/summary")
        if found.kind != "set_aside":
            hint = found.next or "correct its cause, and it disappears"
            raise Refused(409, "only what was set aside can be dismissed", hint)
        ops.state.pages.dismiss(problem_id, ops.clock(), request.scope["state"]["grant"].name)
        return {"id": problem_id, "dismissed": True}


# ---- the map


def _map(router: APIRouter, ops: BuiltService) -> None:
    @router.get(
        "/ops/map",
        openapi_extra=READ,
        summary="The whole of a span in one letter a cell, by partition or in groups",
        responses={**answered_with(MAP, "one letter a cell"), **faults({400: "the span is not one of these"})},
    )
    def delivery_map(
        job: JobName,
        span: Annotated[str, Query(max_length=8, description="24h, 7d, 30d or 365d.")] = "24h",
        cells: Annotated[int | None, Query(ge=1, le=100, description="7d: 42 or 14; 365d: 53 or 13.")] = None,
        tz: Zone = "UTC",
        *,
        problems: Annotated[bool, Query(description="Only partitions in which something is wrong.")] = False,
        find: Annotated[str, Query(max_length=100, description="Only names that hold this.")] = "",
        first: Annotated[str, Query(max_length=300, description="Open a group: its first name.")] = "",
        last: Annotated[str, Query(max_length=300, description="Open a group: its last name.")] = "",
        start: Annotated[Instant | None, Query(alias="from", description="Open a cell: its start.")] = None,
        end: Annotated[Instant | None, Query(alias="to", description="Open a cell: its end.")] = None,
        offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
        limit: Annotated[int, Query(ge=1, le=ROWS_A_PAGE)] = ROWS_A_PAGE,
    ) -> dict[str, Any]:
        now, zone = ops.clock(), zone_of(tz)
        chosen = cells_of_span(span, cells, zone, now)
        if (start is None) != (end is None):
            raise Refused(422, "'from' and 'to' go together", "send both or neither", "query.from")
        if start is not None and end is not None:
            window = bounded(start, end, "query", MOST_DAYS)
            chosen = cells_between(window.start, window.end, zone)
        names = NameFilter(first, last, find)
        found = ops.maps.whole(job, chosen, names, offset=offset, limit=limit, only_problems=problems)
        return {"job": job, "span": span, "now": instant_text(now), **_shown(found, chosen, now)}


def _map_windows(router: APIRouter, ops: BuiltService) -> None:
    @router.get(
        "/ops/map/windows",
        openapi_extra=READ,
        summary="The windows of a cell, from a listing of the destination made now",
        responses=answered_with(MAP_WINDOWS, "windows, oldest first"),
    )
    def windows(
        job: JobName,
        partition: Annotated[str, Query(max_length=300)],
        start: Annotated[Instant, Query(alias="from")],
        end: Annotated[Instant, Query(alias="to")],
    ) -> dict[str, Any]:
        window = bounded(start, end, "query", WINDOW_DAYS)
        cells = ops.maps.partition(job, partition, window)
        gone = ops.maps.gone_since(job)
        with ops.state.pages.look() as look:
            of = {"pipeline": job, "partition": partition, "since_at": window.start, "until_at": window.end}
            records: dict[datetime, list[Mapping[str, Any]]] = {}
            for row in look.rows("window_records", **of):
                records.setdefault(row["starts_at"], []).append(row)
            shown = []
            for cell in cells:
                own, letter = records.get(cell.window.start, []), letter_of(cell)
                runs = look.rows("run_at", job=job, at=own[0]["updated_at"]) if own else []
                shown.append(
                    {
                        "from": whole_second(cell.window.start),
                        "to": whole_second(cell.window.end),
                        "letter": letter,
                        "state": WORDS[letter],
                        "rows": cell.rows,
                        "objects": cell.objects,
                        "bytes": sum(each["size_bytes"] for each in own),
                        "object": own[0]["s3_key"] if own else "",
                        "delivered_at": instant_text(own[0]["updated_at"]) if own else None,
                        "run_id": runs[0]["run_id"] if runs else None,
                        "gone_since": instant_text(gone.get((partition, cell.window.start))),
                    }
                )
        return {"job": job, "partition": partition, "windows": shown}


def bounded(start: datetime, end: datetime, where: str, days: int | None = None, hint: str = "") -> Window:
    """`[start, end)` from the `where` of a request, query or body. Refuses a span that is empty, reversed or longer
    than `days`, with `hint`.
    """
    try:
        window = Window(start, end)
    except ValueError:
        earlier = "give the earlier timestamp as 'from'"
        raise Refused(422, "'from' must be earlier than 'to'", earlier, f"{where}.from") from None
    if start.year == MINYEAR or end.year == MAXYEAR:  # a local day may begin before or end after these
        raise Refused(422, "the span is out of range", "give timestamps of this century", f"{where}.from")
    if days is not None and window.seconds > days * 86_400:
        raise Refused(422, f"more than {days} days", hint or f"ask for {days} days or less", f"{where}.to")
    return window


def _shown(found: DeliveryMap, cells: MapCells, now: datetime) -> Mapping[str, Any]:
    head = {
        "start": instant_text(cells.edges[0]),
        "end": instant_text(cells.edges[-1]),
        "cell_seconds": cells.seconds,
        "starts": [f"{edge:%Y-%m-%dT%H:%MZ}" for edge in cells.edges[:-1]],
        "source": "listing" if found.listed else "records",
        "total": found.total,
        "problems": found.problems,
        "rows_total": found.pages_of,
    }
    if found.grouped:
        groups = [
            {"first": row.name, "last": row.last, "count": row.count, "problems": row.problems, "cells": row.cells}
            for row in found.rows
        ]
        return {**head, "rows": [], "groups": groups}

    def lag(newest_at: datetime | None) -> float | None:
        return None if newest_at is None else round((now - newest_at).total_seconds(), 1)

    rows = [
        {"name": row.name, "cells": row.cells, "lag_seconds": lag(row.newest_at), "error": row.error}
        for row in found.rows
    ]
    return {**head, "rows": rows, "groups": []}


# ---- one run


def known_run(ops: BuiltService, run_id: str) -> Run:
    """The run with this id. Refuses one that is not in the records."""
    with ops.state.pages.look() as look:
        run = look.run(run_id)
    if run is None:
        hint = "only the newest RUN_RECORDS runs of each job are kept; /ops/runs lists them"
        raise Refused(404, f"no run has the id {run_id[:40]!r}", hint)
    return run


def _run(router: APIRouter, ops: BuiltService) -> None:
    @router.get(
        "/ops/runs/{run_id}",
        openapi_extra=READ,
        summary="One run: its ledger, its windows, and the runs beside it",
        responses={**answered_with(RUN_DETAIL, "the run"), **faults({404: "no run has this id"})},
    )
    def run_detail(run_id: str) -> dict[str, Any]:
        run = known_run(ops, run_id)
        view = next((each for each in ops.scheduler.views() if each.job.name == run.job), None)
        with ops.state.pages.look() as look:
            previous, following = look.beside(run)
            pipeline = (view.job.helper_of if view else "") or run.job
            rows = look.written_by(run, pipeline)
            same = look.rows("same_error", job=run.job, error=run.error)[0]["runs"] if run.error else 0
        progress = view.progress if view and run.ended_at is None else None
        gone = ops.maps.gone_since(pipeline)
        return {
            **run_shown(run),
            "helper_of": (view.job.helper_of if view else "") or None,
            "interval_seconds": view.job.interval_seconds if view else None,
            "started_by": run.started_by,
            "requests": run.requests,
            "written": [_written(row, gone) for row in rows],
            "seen_in_runs": same,
            "progress": progress and asdict(progress),
            "previous": _neighbour(previous),
            "next": _neighbour(following),
        }

    @router.get(
        "/ops/runs/{run_id}/log",
        openapi_extra=READ,
        summary="The log lines of a run",
        responses={**answered_with(LOG, "lines, oldest first"), **faults({404: "no run has this id"})},
    )
    def run_log(
        run_id: str, level: Annotated[str, Query(pattern="^(debug|info|warn|error)$")] = "debug"
    ) -> dict[str, Any]:
        run = known_run(ops, run_id)
        service = ops.settings.service
        if service.log_file is None:
            return {"lines": [], "left_out": 0, "note": "LOG_FILE is off: the lines went to standard output only"}
        lines = list(log_lines(service.log_file, service.log_files, run.run_id, LEVELS[level]))
        note = "" if lines else NO_LOG
        return {"lines": lines[-LOG_LINES:], "left_out": max(len(lines) - LOG_LINES, 0), "note": note}


def _kept(router: APIRouter, ops: BuiltService) -> None:
    def files_of(run_id: str) -> Sequence[KeptFile]:
        run = known_run(ops, run_id)
        return ops.pipelines.kept[run.job](run) if run.job in ops.pipelines.kept and run.report.ledger.set_aside else ()

    @router.get(
        "/ops/runs/{run_id}/set-aside",
        openapi_extra=READ,
        summary="Where that lies which a run set aside, and no later one has replaced",
        responses={**answered_with(KEPT, "files by name"), **faults({404: "no run has this id"})},
    )
    def set_aside(run_id: str) -> dict[str, Any]:
        files = files_of(run_id)
        return {"files": [_kept_file(run_id, each) for each in files[:KEPT_FILES]], "total": len(files)}

    @router.get(
        "/ops/runs/{run_id}/set-aside/file",
        openapi_extra=RUN,
        summary="A file of this machine that a run set aside",
        responses={
            200: {"description": "the file", "content": {"application/octet-stream": {}}},
            **faults({404: "the run set no such file aside, or it is no longer there"}),
        },
        response_class=FileResponse,
    )
    def set_aside_file(run_id: str, name: Annotated[str, Query(max_length=300)]) -> FileResponse:
        found = next((each.path for each in files_of(run_id) if each.name == name and each.path), None)
        if found is None:
            hint = f"look at /ops/runs/{run_id}/set-aside"
            raise Refused(404, f"this run set no file {name[:80]!r} aside that is still there", hint)
        return FileResponse(found, media_type="application/octet-stream", filename=name)


def _kept_file(run_id: str, file: KeptFile) -> Mapping[str, Any]:
    """`href` is relative to the root; `needs` is the scope that is required to read it."""
    href, needed = f"s3/download?key={quote(file.key, safe='')}", "s3:read"
    if file.path is not None:
        href, needed = file_address(run_id, file.name), "ops:run"
    return {"name": file.name, "bytes": file.size_bytes, "href": href, "needs": needed}


def _written(row: Mapping[str, Any], gone: Mapping[tuple[str, datetime], datetime]) -> Mapping[str, Any]:
    states = {"": "OK" if row["status"] == "closed" else WORDS["o"], MISSING: WORDS["m"]}
    return {
        "partition": row["device_id"],
        "from": instant_text(row["starts_at"]),
        "to": instant_text(row["ends_at"]),
        "state": states.get(row["trouble"], WORDS["c"]),
        "rows": row["record_count"],
        "bytes": row["size_bytes"],
        "object": row["s3_key"],
        "written_at": instant_text(row["updated_at"]),
        "gone_since": instant_text(gone.get((row["device_id"], row["starts_at"]))),
    }


def _neighbour(run: Run | None) -> Mapping[str, Any] | None:
    if run is None:
        return None
    return {"run_id": run.run_id, "started_at": instant_text(run.started_at), "outcome": run.outcome.value}


def log_lines(path: Path, rotated: int, run_id: str, level: int) -> Iterator[Mapping[str, str]]:
    """The lines of a run in the log file and up to `rotated` older ones, oldest first; none when the files are plain
    text.
    """
    wanted = f'"run_id": "{run_id}"'.encode()
    for number in range(rotated, -1, -1):
        file = path.with_name(f"{path.name}.{number}") if number else path
        try:
            with file.open("rb") as lines:
                chosen = [line for line in lines if wanted in line]
        except OSError:
            continue  # not rotated so often, or deleted in the meantime
        for line in chosen:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a full disk or a kill tore it, or it is text that quotes a line
            if LEVELS.get(entry.get("level", ""), 1) >= level:
                told = {name: str(entry.get(name, "")) for name in ("time", "level", "message")}
                yield told | ({"exception": str(entry["exception"])} if "exception" in entry else {})
