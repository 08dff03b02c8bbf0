"""Reports run by DuckDB over exactly the objects that are there, and never over half of one version.

Invariants: in a directory every file is pinned by a link, or copied, before it is read; in a bucket every object is
fetched whole by one request, and where one is too large for that, the answer counts only if no object has changed
meanwhile. Whatever goes wrong with an object, the objects are listed again and the report run again, a few times only;
what is wrong with a report is told at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Protocol

from app.analytics.engine import Engine, Files, Remote
from app.analytics.faults import RETRY_HINT, Unbound, Unreadable, Wrong
from app.analytics.formats import BATCH_ROWS, Answer, Shape, of_batches
from app.analytics.reports import Reads, Report
from app.analytics.summaries import Summaries
from app.core.errors import Conflict, Permanent, Rejected
from app.stores.summaries import Source

ATTEMPTS = 4
WHOLE_BYTES = 16 << 20


class Objects(Protocol):
    """Where queries find the objects."""

    @contextmanager
    def opened(self, sources: Sequence[Source]) -> Iterator[tuple[Engine, Sequence[str]]]:
        """An engine, and the names by which it reads these objects, good until the block ends: whole versions, the
        listed ones or newer. May raise Conflict when one of them is gone already.
        """

    def certain(self, sources: Sequence[Source]) -> bool:
        """Whether what was read in `opened` cannot have been of two versions."""

    def close(self) -> None:
        """Give the memory back."""


@dataclass(frozen=True, slots=True)
class LocalObjects:
    """Objects of a directory. `pin(key, target)` links or copies the version that is there; None when there is none."""

    engine: Engine
    pin: Callable[[str, Path], str | None]

    @contextmanager
    def opened(self, sources: Sequence[Source]) -> Iterator[tuple[Engine, Sequence[str]]]:
        """See `Objects.opened`. A whole version that is newer than the listed one serves as well, and an object that is
        gone is left out: the answer is of now, however fast objects are replaced.
        """
        with TemporaryDirectory(dir=self.engine.folder, prefix="pins-") as folder:
            files = [(source.key, Path(folder) / f"{number}.parquet") for number, source in enumerate(sources)]
            yield self.engine, [str(file) for key, file in files if self.pin(key, file) is not None]

    def certain(self, sources: Sequence[Source]) -> bool:
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
    def opened(self, sources: Sequence[Source]) -> Iterator[tuple[Engine, Sequence[str]]]:
        """See `Objects.opened`."""
        engine = self._engine(whole=self.certain(sources))
        bucket = engine.remote.bucket if engine.remote else ""
        yield engine, [f"s3://{bucket}/{source.key}" for source in sources]

    def certain(self, sources: Sequence[Source]) -> bool:
        """See `Objects.certain`: fetched whole, unless one is too large to be held in memory."""
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

    def close(self) -> None:
        """Give the memory of all engines back; a later report opens them anew."""
        self._objects.close()
        self._local.close()

    def columns(self, report: Report) -> Mapping[str, str]:
        """Name -> type of the answer's columns, without reading any object. Raises Permanent when it cannot be run."""
        self.check(report)
        values = {each.name: each.read(each.default) for each in report.parameters}
        with _named(report):
            return self._local.columns(report.sql(Files(self._local.folder).relation()), values)

    def check(self, report: Report) -> None:
        """Raises Permanent for a report that may not or cannot be run."""
        if report.text in self._checked:
            return
        declared = {each.name for each in report.parameters}
        try:
            with _named(report):
                used = self._local.check(report.sql())
        except (Rejected, Unreadable) as error:
            raise Permanent(f"report {report.name}.sql: {error.message}", error.hint) from error
        if used != declared:
            names = ", ".join(sorted(used ^ declared))
            raise Permanent(f"report {report.name}.sql: {names}", "declare each parameter once and use it as $name")
        self._checked.add(report.text)

    def run(self, report: Report, values: Mapping[str, Any], shape: Shape) -> Answer:
        """The answer over all rows that are there. Raises Permanent when the report is wrong, Transient when an object
        cannot be read, or is replaced, each time.
        """
        self.check(report)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with _named(report):
                    return self._attempt(report, values, shape)
            except (Unreadable, Conflict):
                if attempt == ATTEMPTS:
                    raise
                self._summaries.refresh()
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, report: Report, values: Mapping[str, Any], shape: Shape) -> Answer:
        sources = self._sources(report.reads, values)
        with self._objects.opened(sources) as (engine, names):
            relation = Files(engine.folder, names, self._summaries.instants).relation()
            with _fitting(engine, relation), engine.batches(report.sql(relation), values, BATCH_ROWS) as reader:
                answer = of_batches(reader, shape, engine.folder)
        if not self._objects.certain(sources):
            self._summaries.refresh()
            if not self._summaries.holds(sources):
                raise Unreadable("objects were replaced while they were read", "nothing to do: they are read again")
        return answer

    def _sources(self, reads: Reads, values: Mapping[str, Any]) -> Sequence[Source]:
        def value(name: str) -> Any:
            return values[name] if name else None

        return self._summaries.sources(value(reads.device), value(reads.since), value(reads.until))


@contextmanager
def _named(report: Report) -> Iterator[None]:
    """What is wrong with a report, with its name."""
    try:
        yield
    except Wrong as error:
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
            raise Unreadable(fault.message, RETRY_HINT) from error
        raise
