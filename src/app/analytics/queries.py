"""Reports run by DuckDB over exactly the objects that exist now, never over a mix of two versions.

Invariants: in a directory, every file is pinned by a hard link, or copied, before it is read; in a bucket, every object
is fetched whole with one request, and if one is too large for that, the answer counts only if no object has changed
meanwhile. When an object cannot be read, the objects are listed again and the report is retried a few times; an object
that still fails is left out and named, and does not block others; an error of the report itself is raised at once.
Where there is a table of closed days, its files replace the objects that they were made from.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Protocol

from app.analytics.columns import ReportFile, family, file_of, format_of, relation, schemas, suffix_of, table_file_of
from app.analytics.engine import (
    DOCUMENTED,
    RELATION,
    RETRY_HINT,
    Engine,
    InvalidReport,
    RemoteBucket,
    ReportTooLarge,
    UnboundName,
    UnreadableObject,
    quoted,
)
from app.analytics.formats import AnswerShape, ReportAnswer, of_batches
from app.analytics.reports import BadParameter, ReportDefinition
from app.analytics.spark import SparkReports
from app.analytics.summaries import ListingView, Summaries
from app.core.closed_days import EVERYTHING, NO_TABLE, ClosedDays, ReportSpan, TableFile, TableRows, TableState
from app.core.errors import Conflict, Permanent, Rejected
from app.db.object_summaries import Version, VersionToRead

ATTEMPTS = 4
WHOLE_BYTES = 16 << 20
BROKEN = 20  # with more, single objects are not to blame
BROKEN_SECONDS = 600.0
OF_STORE = re.compile(r"HTTP|[Cc]onnect|[Tt]imeout")
OTHER = "try other values; if none work, correct the report's SQL file"
WARNINGS = 20
STAR = re.compile(r"(select|distinct|,|\.)\s*\*", re.IGNORECASE)  # not the star of count(*) or of a multiplication
LeftOut = Mapping[Version, tuple[str, str]]
"""Version -> key and reason."""


@dataclass(frozen=True, slots=True)
class ReadSet:
    """What a report reads: versions of objects, and the table's rows within a span."""

    sources: Sequence[VersionToRead]
    table: TableRows = NO_TABLE
    span: ReportSpan = EVERYTHING

    @property
    def in_table(self) -> TableState | None:
        """The table's state if the table alone has everything; None if objects are read too."""
        return None if self.sources or any(file.without for file in self.table.files) else self.table.state


class ReportObjects(Protocol):
    """Where queries find the objects."""

    @contextmanager
    def opened(self, wanted: ReadSet) -> Iterator[tuple[Engine, Sequence[ReportFile]]]:
        """An engine, and these objects as files that it can read until the block ends: whole versions, as listed or
        newer. May raise Conflict when one has been deleted.
        """

    def certain(self, wanted: ReadSet) -> bool:
        """Whether the read in `opened` cannot have mixed two versions."""

    def close(self) -> None:
        """Release the memory."""


@dataclass(frozen=True, slots=True)
class LocalObjects:
    """Objects of a directory. `pin(key, target)` links or copies the current version; None when there is none."""

    engine: Engine
    pin: Callable[[str, Path], str | None]

    @contextmanager
    def opened(self, wanted: ReadSet) -> Iterator[tuple[Engine, Sequence[ReportFile]]]:
        """See `ReportObjects.opened`. A version newer than the listed one is fine if it is whole, and a deleted object
        is left out: the answer reflects the present, however fast objects are replaced.
        """
        with TemporaryDirectory(dir=self.engine.folder, prefix="pins-") as folder:
            files, newer = [], []
            for number, source in enumerate(wanted.sources):
                file = Path(folder) / f"{number}{suffix_of(source.key)}"
                etag = self.pin(source.key, file)
                if etag == source.etag:
                    files.append(file_of(str(file), source.key, source.columns))
                elif etag is not None:
                    newer.append((str(file), source.key))
            found = schemas(self.engine, newer) if newer else {}
            described = [file_of(name, key, json.dumps(found[name])) for name, key in newer]
            for each in described:
                if each.reading.problem:
                    raise UnreadableObject(f"{each.key}: {each.reading.problem}", RETRY_HINT)
            table = {str(Path(folder) / f"t{number}.parquet"): file for number, file in enumerate(wanted.table.files)}
            for name, held in table.items():
                if self.pin(held.key, Path(name)) is None:
                    raise UnreadableObject(f"{held.key} is gone", RETRY_HINT)
            yield self.engine, [*files, *described, *_of_table(self.engine, table, wanted.span)]

    def certain(self, wanted: ReadSet) -> bool:
        """See `ReportObjects.certain`: a linked version never changes."""
        del wanted
        return True

    def close(self) -> None:
        """See `ReportObjects.close`."""
        self.engine.close()


class BucketObjects:
    """Objects of a bucket. `remote(whole)` gives the current bucket and keys; the keys may rotate."""

    def __init__(
        self,
        remote: Callable[[bool], RemoteBucket],
        make: Callable[[RemoteBucket], Engine],
        whole_bytes: int = WHOLE_BYTES,
    ) -> None:
        self._remote = remote
        self._make = make
        self._whole_bytes = whole_bytes
        self._lock = Lock()
        self._engines: dict[bool, Engine] = {}

    @contextmanager
    def opened(self, wanted: ReadSet) -> Iterator[tuple[Engine, Sequence[ReportFile]]]:
        """See `ReportObjects.opened`."""
        engine = self._engine(whole=self._whole(wanted))
        root = f"s3://{engine.remote.bucket if engine.remote else ''}/"
        files = [file_of(f"{root}{source.key}", source.key, source.columns) for source in wanted.sources]
        table = {f"{root}{file.key}": file for file in wanted.table.files}
        yield engine, [*files, *_of_table(engine, table, wanted.span)]

    def certain(self, wanted: ReadSet) -> bool:
        """See `ReportObjects.certain`: true when all are fetched whole, so none is too large for memory, and none is
        CSV: a newer CSV version may have other columns, and its rows do not show it. Files of the table never change.
        """
        is_csv = any(format_of(source.key) == "csv" for source in wanted.sources)
        return not wanted.sources or (self._whole(wanted) and not is_csv)

    def _whole(self, wanted: ReadSet) -> bool:
        """False if a file is large: then only the parts that the report needs are fetched, of all files of the read."""
        sizes = [*(each.size_bytes for each in wanted.sources), *(each.size_bytes for each in wanted.table.files)]
        return max(sizes, default=0) <= self._whole_bytes

    def _engine(self, *, whole: bool) -> Engine:
        remote = self._remote(whole)
        with self._lock:
            held = self._engines.get(whole)
            if held is None or held.remote != remote:
                self._engines[whole] = self._make(remote)
                if held is not None:
                    held.close()
            return self._engines[whole]

    def close(self) -> None:
        """Release the memory."""
        with self._lock:
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()


def _of_table(engine: Engine, table: Mapping[str, TableFile], span: ReportSpan) -> Sequence[ReportFile]:
    """Files of the table, under the names that the engine uses."""
    found = schemas(engine, [(name, file.key) for name, file in table.items()])
    return [table_file_of(name, file, json.dumps(found[name]), span) for name, file in table.items()]


class Queries:
    """Runs reports. `local` checks their SQL and reads no object. `table`: the table of closed days, if there is one;
    `spark`: runs reports that need only closed days, if Spark is configured.
    """

    def __init__(
        self,
        summaries: Summaries,
        objects: ReportObjects,
        local: Engine,
        table: ClosedDays | None = None,
        spark: SparkReports | None = None,
    ) -> None:
        self._summaries = summaries
        self._objects = objects
        self._local = local
        self._table = table
        self._spark = spark
        self._day_rows: tuple[int, Counter[int]] = (0, Counter())
        self._checked: set[str] = set()
        self._broken: dict[tuple[str, Version], tuple[str, float]] = {}

    def close(self) -> None:
        """Release the memory of all engines; a later report reopens them."""
        self._objects.close()
        self._local.close()

    def columns(self, report: ReportDefinition) -> Mapping[str, str]:
        """Name -> type of the answer's columns, without reading any object. Raises Permanent if it cannot run."""
        self.check(report)
        values = {each.name: None if each.required else each.read(None) for each in report.parameters}
        with _named(report):
            return self._local.columns(report.sql(self.rows(report.text, self._local, [])), values)

    def check(self, report: ReportDefinition) -> None:
        """Raises Permanent for a report that is not allowed or cannot run."""
        if report.text in self._checked:
            return
        try:
            used = self._local.check(report.sql())
        except (Rejected, UnreadableObject) as error:
            raise Permanent(f"report {report.name}.sql: {error.message}", error.hint) from error
        if odd := used ^ {each.name for each in report.parameters}:
            names = ", ".join(sorted(odd))
            raise Permanent(f"report {report.name}.sql: {names}", "declare each parameter once and use it as $name")
        self._checked.add(report.text)

    def has_older_rows(self, view: ListingView) -> bool:
        """Whether the table has rows whose objects were deleted, so that the summaries lack them."""
        if self._table is None:
            return False
        number, rows = self._day_rows
        if number != view.number:
            rows = Counter()
            for (_, day), part in view.days.items():
                rows[day] += part.rows
            self._day_rows = view.number, rows
        return any(count > rows[day] for day, count in self._table.day_counts().items())

    def to_read(self, span: ReportSpan, as_of: datetime | None = None) -> ReadSet:
        """What to read for a span: now, or from the table as of `as_of`. Raises BadParameter if there is no table for
        that time.
        """
        if as_of is not None:
            if self._table is None:
                raise BadParameter(
                    "as_of needs the table of closed days", "set CATALOG=iceberg, and install headwater[lake]"
                )
            try:
                return ReadSet([], self._table.rows_at(as_of, span), span)
            except Rejected as error:
                raise BadParameter(error.message, error.hint) from error
        view = self._summaries.view
        table = NO_TABLE
        if self._table is not None and view is not None:
            table = self._table.rows(span, view.changes, partial(self._summaries.sources_of_days, None))
        sources = self._summaries.sources(span.device, span.since, span.until)
        return ReadSet([source for source in sources if table.beside(source)], table, span)

    def confirm(self, objects: ReportObjects, wanted: ReadSet) -> None:
        """Raises UnreadableObject if the read may have mixed two versions."""
        if not objects.certain(wanted):
            self._summaries.refresh()
            if not self._summaries.holds(wanted.sources):
                raise UnreadableObject("objects were replaced while they were read", RETRY_HINT)

    def run(
        self, report: ReportDefinition, values: Mapping[str, Any], shape: AnswerShape, as_of: datetime | None = None
    ) -> ReportAnswer:
        """The answer over all current rows, or over the table of closed days as of `as_of`; its warnings name what is
        left out. Raises Permanent for an invalid report, Transient when no object can be read or objects are replaced
        during each attempt.
        """
        self.check(report)
        with _named(report, values):
            attempt = partial(self._answer, report, values, shape, as_of)
            try:
                return self.retry(attempt, ATTEMPTS)
            except (UnreadableObject, Conflict):
                if not self._find_broken(report, values, shape):
                    raise
            return attempt()

    def retry(self, attempt: Callable[[], ReportAnswer], times: int) -> ReportAnswer:
        """The answer of the first of several attempts at which every object could be read."""
        for _ in range(times - 1):
            try:
                return attempt()
            except (UnreadableObject, Conflict):
                self.look_again()
        return attempt()

    def look_again(self) -> None:
        """Refresh the listing and the table, since something to be read has been deleted."""
        self._summaries.refresh()
        if self._table is not None:
            self._table.look_again()

    def _answer(
        self, report: ReportDefinition, values: Mapping[str, Any], shape: AnswerShape, as_of: datetime | None
    ) -> ReportAnswer:
        """Run without the objects that recently broke this report. If the column types do not match, retry without the
        objects whose column types differ from the majority.
        """
        wanted = self.to_read(report.span(values), as_of)
        if self._spark and self._spark.knows(report) and (state := wanted.in_table):
            return self._spark.run(report, values, shape, state, wanted.span)
        found, now = wanted.sources, time.monotonic()
        faults = {
            version: text
            for (path, version), (text, until) in self._broken.items()
            if until > now and path == report.path
        }
        broken = {one.version: (one.key, faults[one.version]) for one in found if one.version in faults}
        sources = [source for source in found if source.version not in broken]
        try:
            return self._attempt(report, values, shape, wanted, broken)
        except InvalidReport:
            for odd in mixed_type_columns(report.text, sources):
                with suppress(InvalidReport):  # the error for all objects is raised below
                    return self._attempt(report, values, shape, wanted, {**broken, **odd})
            raise

    def _attempt(
        self,
        report: ReportDefinition,
        values: Mapping[str, Any],
        shape: AnswerShape,
        found: ReadSet,
        left_out: LeftOut,
    ) -> ReportAnswer:
        wanted = replace(found, sources=[source for source in found.sources if source.version not in left_out])
        with self._objects.opened(wanted) as (engine, files), _by_key(files):
            rows = self.rows(report.text, engine, files)
            with _fitting(engine, rows), engine.batches(report.sql(rows), values) as reader:
                answer = of_batches(reader, _with_warnings(shape, left_out), engine.folder)
        self.confirm(self._objects, wanted)
        answer.left_out = len(left_out)
        answer.state = found.table.state
        return answer

    def rows(self, text: str, engine: Engine, files: Sequence[ReportFile]) -> str:
        """The rows of these files, for a statement. A column that it may name and only other objects have is null here,
        as a documented one would be, so that a statement which is right for one device is not wrong for another.
        """
        rows, view = relation(engine.folder, files), self._summaries.view
        words = {word.lower() for word in re.findall(r"\w+", text)}
        readings = {id(file.reading): file.reading for file in files}.values()  # many files have the same
        there = {*DOCUMENTED, *(name for reading in readings for name in reading.lower_names)}
        elsewhere = {name.lower(): name for name in (view.columns if view else ())}
        missing = [
            f"CAST(NULL AS {max(view.columns[own].items(), key=itemgetter(1))[0]}) AS {quoted(own)}"
            for name, own in elsewhere.items()
            if view and name in words and name not in there
        ]
        return f"(SELECT *, {', '.join(missing)} FROM {rows}) AS {RELATION}" if missing else rows  # noqa: S608 - our own

    def _find_broken(self, report: ReportDefinition, values: Mapping[str, Any], shape: AnswerShape) -> bool:
        """Bisect for objects that break the report twice on their own while it works with others, and remember them.
        False when there are none or too many, or the search takes too long.
        """
        began = time.monotonic()
        span = report.span(values)
        sources = self._summaries.sources(span.device, span.since, span.until)
        waiting = [sources]
        broken: dict[Version, str] = {}
        while waiting:
            part = waiting.pop()
            trouble = self._trouble(report, values, shape, part) and self._trouble(report, values, shape, part)
            if not trouble:
                continue
            if len(part) > 1:
                waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
            elif part:
                broken[part[0].version] = trouble
            if len(broken) > BROKEN or time.monotonic() - began > self._local.limits.seconds:
                return False
        if broken:  # what was replaced meanwhile is not damaged, and its rows are not left out
            self._summaries.refresh()
            held = {source.version for source in sources if self._summaries.holds([source])}
            broken = {version: text for version, text in broken.items() if version in held}
        # Where it works with none of them, the store or the report may be to blame.
        is_other_cause = len(broken) == len(sources) and (
            any(map(OF_STORE.search, broken.values())) or bool(self._trouble(report, values, shape, ()))
        )
        if not broken or is_other_cause:
            return False
        now = time.monotonic()
        found = {(report.path, version): (text, now + BROKEN_SECONDS) for version, text in broken.items()}
        self._broken = {**{key: held for key, held in self._broken.items() if held[1] > now}, **found}
        return True

    def _trouble(
        self, report: ReportDefinition, values: Mapping[str, Any], shape: AnswerShape, sources: Sequence[VersionToRead]
    ) -> str:
        """Why the report cannot read these objects; "" when it can, or when it is invalid over so few of them."""
        try:
            self._attempt(report, values, shape, ReadSet(sources), {})
        except (UnreadableObject, Conflict) as error:
            return error.message
        except InvalidReport:
            return ""
        return ""


@contextmanager
def _named(report: ReportDefinition, values: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Add the report's name to its errors. Errors caused by a caller's parameter values become the caller's to fix."""
    try:
        yield
    except ReportTooLarge as error:
        raise Permanent(f"report {report.name} {error.message}", error.hint) from error
    except InvalidReport as error:
        chosen = {
            each.name: value
            for each in report.parameters
            if (value := (values or {}).get(each.name)) is not None and (each.required or value != each.read(None))
        }
        if chosen and not isinstance(error, UnboundName):
            said = ", ".join(f"{name}={value}" for name, value in chosen.items())
            raise BadParameter(f"report {report.name} cannot be run with {said}: {error.message}", OTHER) from error
        raise Permanent(f"report {report.name}.sql cannot be run: {error.message}", error.hint) from error


@contextmanager
def _fitting(engine: Engine, relation: str) -> Iterator[None]:
    """When names or types do not match, check whether the cause is objects that no longer fit together."""
    try:
        yield
    except UnboundName as error:
        try:
            engine.columns(f"SELECT * FROM {relation}", {})  # noqa: S608 - our own
        except InvalidReport as fault:
            raise UnreadableObject(fault.message, RETRY_HINT) from error
        raise


@contextmanager
def _by_key(files: Sequence[ReportFile]) -> Iterator[None]:
    """Replace the names of local copies in errors by the objects' keys."""
    try:
        yield
    except UnreadableObject as error:
        message = error.message
        for file in files:
            message = message.replace(file.name, file.key)
        raise UnreadableObject(message, error.hint) from error


def _with_warnings(shape: AnswerShape, left_out: LeftOut) -> AnswerShape:
    """The shape plus a warning for each object left out."""
    found = [{"object": key, "message": f"left out of this report: {reason}"} for key, reason in left_out.values()]
    if len(found) > WARNINGS:
        more = {"object": "", "message": f"{len(found) - WARNINGS} more objects are left out of this report"}
        found = [*found[:WARNINGS], more]
    return replace(shape, warnings=[*shape.warnings, *found])


def mixed_type_columns(text: str, sources: Sequence[VersionToRead]) -> Iterator[LeftOut]:
    """What to leave out of this report so that each undocumented column it names has one type: first the type of most
    objects, then the next most common.
    """
    kinds: dict[str, dict[str, list[VersionToRead]]] = {}
    words = {word.lower() for word in re.findall(r"\w+", text)}
    is_all = STAR.search(text) is not None
    for source in sources:
        own = file_of("", source.key, source.columns).reading
        for name, known in own.further.items():
            kind = family(own.types[known])
            if kind and not own.is_csv and (is_all or name in words):
                kinds.setdefault(name, {}).setdefault(kind, []).append(source)
    differing = {
        name: sorted(found.items(), key=lambda each: -len(each[1])) for name, found in kinds.items() if len(found) > 1
    }
    for place in range(max(map(len, differing.values()), default=0)):
        yield {
            source.version: (source.key, f"its column {name} is {kind}, and {ranked[place % len(ranked)][0]} elsewhere")
            for name, ranked in differing.items()
            for number, (kind, found) in enumerate(ranked)
            if number != place % len(ranked)
            for source in found
        }
