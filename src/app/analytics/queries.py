"""Reports run by DuckDB over exactly the objects that are there, and never over half of one version.

Invariants: in a directory every file is pinned by a link, or copied, before it is read; in a bucket every object is
fetched whole by one request, and where one is too large for that, the answer counts only if no object has changed
meanwhile. Whatever goes wrong with an object, the objects are listed again and the report is run again, a few times
only; one that still fails is left out and named, and hinders no other; an error of the report itself is raised at once.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Protocol

from app.analytics.columns import File, family, file_of, format_of, relation, schemas, suffix_of
from app.analytics.engine import RETRY_HINT, Engine, Remote, TooLarge, Unbound, UnreadableObject, Wrong
from app.analytics.formats import BATCH_ROWS, AnswerShape, ReportAnswer, of_batches
from app.analytics.reports import BadParameter, ReportDefinition
from app.analytics.summaries import Summaries
from app.core.errors import Conflict, Permanent, Rejected
from app.db.object_summaries import Version, VersionToRead

ATTEMPTS = 4
WHOLE_BYTES = 16 << 20
BROKEN = 20  # more than that is not the fault of single objects
BROKEN_SECONDS = 600.0
OTHER = "send other values; if none works, correct the report's SQL file"
WARNINGS = 20
STAR = re.compile(r"(select|distinct|,|\.)\s*\*", re.IGNORECASE)  # not the star of count(*) or of a product
LeftOut = Mapping[Version, tuple[str, str]]
"""Version -> key and reason."""


class Objects(Protocol):
    """Where queries find the objects."""

    @contextmanager
    def opened(self, sources: Sequence[VersionToRead]) -> Iterator[tuple[Engine, Sequence[File]]]:
        """An engine, and these objects as it reads them, good until the block ends: whole versions, the listed ones or
        newer. May raise Conflict when one of them is gone already.
        """

    def certain(self, sources: Sequence[VersionToRead]) -> bool:
        """Whether what was read in `opened` cannot have been of two versions."""

    def close(self) -> None:
        """Give the memory back."""


@dataclass(frozen=True, slots=True)
class LocalObjects:
    """Objects of a directory. `pin(key, target)` links or copies the version that is there; None when there is none."""

    engine: Engine
    pin: Callable[[str, Path], str | None]

    @contextmanager
    def opened(self, sources: Sequence[VersionToRead]) -> Iterator[tuple[Engine, Sequence[File]]]:
        """See `Objects.opened`. A whole version that is newer than the listed one serves as well, and an object that is
        gone is left out: the answer is of now, however fast objects are replaced.
        """
        with TemporaryDirectory(dir=self.engine.folder, prefix="pins-") as folder:
            files, newer = [], []
            for number, source in enumerate(sources):
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
            yield self.engine, [*files, *described]

    def certain(self, sources: Sequence[VersionToRead]) -> bool:
        """See `Objects.certain`: a link stays what it is."""
        del sources
        return True

    def close(self) -> None:
        """See `Objects.close`."""
        self.engine.close()


class BucketObjects:
    """Objects of a bucket. `remote(whole)` is how it is reached now; its keys may change from time to time."""

    def __init__(
        self, remote: Callable[[bool], Remote], make: Callable[[Remote], Engine], whole_bytes: int = WHOLE_BYTES
    ) -> None:
        self._remote = remote
        self._make = make
        self._whole_bytes = whole_bytes
        self._lock = Lock()
        self._engines: dict[bool, Engine] = {}

    @contextmanager
    def opened(self, sources: Sequence[VersionToRead]) -> Iterator[tuple[Engine, Sequence[File]]]:
        """See `Objects.opened`."""
        engine = self._engine(whole=self._whole(sources))
        bucket = engine.remote.bucket if engine.remote else ""
        yield engine, [file_of(f"s3://{bucket}/{source.key}", source.key, source.columns) for source in sources]

    def certain(self, sources: Sequence[VersionToRead]) -> bool:
        """See `Objects.certain`: fetched whole, unless one is too large to be held in memory; and a newer version of
        CSV may have other columns, which nothing in its rows tells.
        """
        return self._whole(sources) and not any(format_of(source.key) == "csv" for source in sources)

    def _whole(self, sources: Sequence[VersionToRead]) -> bool:
        return all(source.size_bytes <= self._whole_bytes for source in sources)

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
        """Give the memory back."""
        with self._lock:
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()


class Queries:
    """Runs reports. `local` checks their texts; it reads no object."""

    def __init__(self, summaries: Summaries, objects: Objects, local: Engine) -> None:
        self._summaries = summaries
        self._objects = objects
        self._local = local
        self._checked: set[str] = set()
        self._broken: dict[tuple[str, Version], tuple[str, float]] = {}

    def close(self) -> None:
        """Give the memory of all engines back; a later report re-opens them."""
        self._objects.close()
        self._local.close()

    def columns(self, report: ReportDefinition) -> Mapping[str, str]:
        """Name -> type of the answer's columns, without reading any object. Raises Permanent when it cannot be run."""
        self.check(report)
        values = {each.name: None if each.required else each.read(None) for each in report.parameters}
        with _named(report):
            return self._local.columns(report.sql(relation(self._local.folder, [])), values)

    def check(self, report: ReportDefinition) -> None:
        """Raises Permanent for a report that may not or cannot be run."""
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

    def run(self, report: ReportDefinition, values: Mapping[str, Any], shape: AnswerShape) -> ReportAnswer:
        """The answer over all rows that are there; what is left out is in its warnings. Raises Permanent when the
        report is wrong, Transient when no object can be read, or they are replaced each time.
        """
        self.check(report)
        with _named(report, values):
            for _ in range(ATTEMPTS - 1):
                try:
                    return self._answer(report, values, shape)
                except (UnreadableObject, Conflict):
                    self._summaries.refresh()
            try:
                return self._answer(report, values, shape)
            except (UnreadableObject, Conflict):
                if not self._find_broken(report, values, shape):
                    raise
            return self._answer(report, values, shape)

    def _answer(self, report: ReportDefinition, values: Mapping[str, Any], shape: AnswerShape) -> ReportAnswer:
        """Without the objects with which this report went wrong a while ago; where the report does not fit, without
        those whose columns are of another kind than in most.
        """
        found = self._summaries.sources(*report.span(values))
        now = time.monotonic()
        faults = {
            version: text
            for (path, version), (text, until) in self._broken.items()
            if until > now and path == report.path
        }
        broken = {one.version: (one.key, faults[one.version]) for one in found if one.version in faults}
        sources = [source for source in found if source.version not in broken]
        try:
            return self._attempt(report, values, shape, sources, broken)
        except Wrong:
            for odd in odd_ones(report.text, sources):
                with suppress(Wrong):  # the error over all objects is raised below
                    return self._attempt(report, values, shape, sources, {**broken, **odd})
            raise

    def _attempt(
        self,
        report: ReportDefinition,
        values: Mapping[str, Any],
        shape: AnswerShape,
        found: Sequence[VersionToRead],
        left_out: LeftOut,
    ) -> ReportAnswer:
        sources = [source for source in found if source.version not in left_out]
        with self._objects.opened(sources) as (engine, files), _by_key(files):
            rows = relation(engine.folder, files)
            with _fitting(engine, rows), engine.batches(report.sql(rows), values, BATCH_ROWS) as reader:
                answer = of_batches(reader, _with_warnings(shape, left_out), engine.folder)
        if not self._objects.certain(sources):
            self._summaries.refresh()
            if not self._summaries.holds(sources):
                raise UnreadableObject("objects were replaced while they were read", RETRY_HINT)
        answer.left_out = len(left_out)
        return answer

    def _find_broken(self, report: ReportDefinition, values: Mapping[str, Any], shape: AnswerShape) -> bool:
        """Remember each object with which alone the report goes wrong, twice, while it does not with others. False when
        there is none, or too many, or the search takes too long.
        """
        began = time.monotonic()
        waiting = [self._summaries.sources(*report.span(values))]
        broken: dict[Version, str] = {}
        is_any_right = False
        while waiting:
            part = waiting.pop()
            trouble = self._trouble(report, values, shape, part) and self._trouble(report, values, shape, part)
            if not trouble:
                is_any_right |= bool(part)
            elif len(part) > 1:
                waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
            elif part:
                broken[part[0].version] = trouble
            if len(broken) > BROKEN or time.monotonic() - began > self._local.limits.seconds:
                return False
        if not broken or not is_any_right:
            return False
        now = time.monotonic()
        found = {(report.path, version): (text, now + BROKEN_SECONDS) for version, text in broken.items()}
        self._broken = {**{key: held for key, held in self._broken.items() if held[1] > now}, **found}
        return True

    def _trouble(
        self, report: ReportDefinition, values: Mapping[str, Any], shape: AnswerShape, sources: Sequence[VersionToRead]
    ) -> str:
        """Why these cannot be read by the report; "" when they can, or the report does not fit so few of them."""
        try:
            self._attempt(report, values, shape, sources, {})
        except (UnreadableObject, Conflict) as error:
            return error.message
        except Wrong:
            return ""
        return ""


@contextmanager
def _named(report: ReportDefinition, values: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Errors of a report with its name. What goes wrong with values that a caller chose is the caller's to correct."""
    try:
        yield
    except TooLarge as error:
        raise Permanent(f"report {report.name} {error.message}", error.hint) from error
    except Wrong as error:
        chosen = {
            each.name: value
            for each in report.parameters
            if (value := (values or {}).get(each.name)) is not None and (each.required or value != each.read(None))
        }
        if chosen and not isinstance(error, Unbound):
            said = ", ".join(f"{name}={value}" for name, value in chosen.items())
            raise BadParameter(f"report {report.name} cannot be run with {said}: {error.message}", OTHER) from error
        raise Permanent(f"report {report.name}.sql cannot be run: {error.message}", error.hint) from error


@contextmanager
def _fitting(engine: Engine, relation: str) -> Iterator[None]:
    """When the report does not fit the rows, look whether it is the objects that no longer fit together."""
    try:
        yield
    except Unbound as error:
        try:
            engine.columns(f"SELECT * FROM {relation}", {})  # noqa: S608 - our own
        except Wrong as fault:
            raise UnreadableObject(fault.message, RETRY_HINT) from error
        raise


@contextmanager
def _by_key(files: Sequence[File]) -> Iterator[None]:
    """Errors with the key of an object instead of the name of its copy."""
    try:
        yield
    except UnreadableObject as error:
        message = error.message
        for file in files:
            message = message.replace(file.name, file.key)
        raise UnreadableObject(message, error.hint) from error


def _with_warnings(shape: AnswerShape, left_out: LeftOut) -> AnswerShape:
    """The shape with a warning for each object that is left out."""
    found = [{"object": key, "message": f"left out of this report: {reason}"} for key, reason in left_out.values()]
    if len(found) > WARNINGS:
        more = {"object": "", "message": f"{len(found) - WARNINGS} more objects are left out of this report"}
        found = [*found[:WARNINGS], more]
    return replace(shape, warnings=[*shape.warnings, *found])


def odd_ones(text: str, sources: Sequence[VersionToRead]) -> Iterator[LeftOut]:
    """What to leave out of a report with this text, so that each further column that it names is of one kind: that of
    most objects, then that of the next most.
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
