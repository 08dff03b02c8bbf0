"""What AppMetrica is asked for, and the exports that are under way."""

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo

from app.appmetrica.client import SERVICE, MoreParts, Service, Waiting
from app.core.errors import Permanent
from app.core.retry import Pauses, RetryPolicy, retry
from app.core.windows import Window
from app.db.run_records import Export, SqlPulls

# What AppMetrica is asked for. The question is the name of the file upstream, so it is made once and kept as it is.
#
# Invariant: the same wish gives the same text, and the text alone is enough to ask again, after a restart or
# elsewhere.

FILE = Path(__file__).with_name("resources.toml")
SECOND = timedelta(seconds=1)
LOCAL = "%Y-%m-%d %H:%M:%S"
COLUMN = re.compile(r"[a-z][a-z0-9_]{0,80}")


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of rows. `received` "" = its rows do not say when they were received."""

    name: str
    columns: tuple[str, ...]
    received: str


@lru_cache(maxsize=1)
def resources() -> Mapping[str, Resource]:
    """All that can be asked for, by name."""
    listed = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return {
        name: Resource(name, tuple(each["columns"].split()), each.get("received", "")) for name, each in listed.items()
    }


@dataclass(frozen=True, slots=True)
class Wish:
    """Rows of a resource between two instants of the application's own clock, both included."""

    application_id: int
    resource: str
    since: str
    until: str
    columns: Sequence[str]
    by_receipt: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """A wish as it is kept. `span`: the hours that it is for, None when a person asked."""

    path: str
    span: Window | None = None

    @property
    def text(self) -> str:
        """What is kept."""
        span = [self.span.start.isoformat(), self.span.end.isoformat()] if self.span else None
        return json.dumps({"path": self.path, "span": span})

    @property
    def resource(self) -> str:
        """What is asked for."""
        return self.path.partition(".csv")[0].rpartition("/")[2]

    @property
    def columns(self) -> Sequence[str]:
        """The columns, in the order of the answer."""
        return self.path.rpartition("&fields=")[2].split(",")

    def part(self, number: int, count: int) -> str:
        """The path of one of several parts; of a file in one piece, the path itself."""
        return self.path if count == 1 else f"{self.path}&parts_count={count}&part_number={number}"


def question(wish: Wish, span: Window | None = None) -> Question:
    """The question of a wish. `fields` is last, since it is what an answer is read by."""
    given = {
        "application_id": wish.application_id,
        "date_since": wish.since,
        "date_until": wish.until,
        "date_dimension": "receive" if wish.by_receipt else "default",
        "use_utf8_bom": "false",
        "fields": ",".join(wish.columns),
    }
    query = urlencode(given, quote_via=quote, safe=",:")
    return Question(f"/logs/v1/export/{wish.resource}.csv?{query}", span)


def question_of(text: str) -> Question:
    """What was kept."""
    held = json.loads(text)
    span = held["span"]
    return Question(held["path"], Window(*(datetime.fromisoformat(each) for each in span)) if span else None)


def received_in(application_id: int, resource: Resource, span: Window, zone: ZoneInfo) -> Question:
    """All rows that were received in whole hours, and perhaps more: where clocks go back, two hours have one name."""
    since, until = local(span.start, zone), local(span.end - SECOND, zone)
    return question(Wish(application_id, resource.name, since, until, resource.columns, by_receipt=True), span)


def local(instant: datetime, zone: ZoneInfo) -> str:
    """An instant as the application's clock shows it."""
    return instant.astimezone(UTC).astimezone(zone).strftime(LOCAL)


# Exports under way: the same question again and again until its file is there, however long and over restarts.
#
# Invariants: a question is kept before it is first asked, and asked by the same text until it is done; how many parts
# it takes is kept as well; a file that is older than a day is asked for anew, since the service has forgotten it.

KEPT_FOR = timedelta(hours=24)
FORGOTTEN_AFTER = timedelta(days=30)
MAX_PARTS = 1024
SLOWER = 1.5
LONGEST_PAUSE_SECONDS = 60.0
POLICY = RetryPolicy(attempts=5, first_seconds=1.0, cap_seconds=60.0)


@dataclass(frozen=True, slots=True)
class Polling:
    """How often to ask and for how long; the pause grows up to `longest_seconds`."""

    interval_seconds: float
    timeout_seconds: float
    longest_seconds: float = LONGEST_PAUSE_SECONDS


@dataclass(frozen=True, slots=True)
class Patience:
    """What to do about errors that may pass, and what ends the waiting."""

    pauses: Pauses
    draw: Callable[[], float]
    policy: RetryPolicy = POLICY


class TooManyParts(Permanent):
    """The file is too large for as many parts as we ask for."""


class Files(list[BinaryIO]):
    """The parts that are there so far, in order, each gzip with a header of its own."""

    def close(self) -> None:
        """Free all. Idempotent."""
        while self:
            self.pop().close()


@dataclass(slots=True)
class Asking:
    """One export in the hands of one caller. Safe to give up at any time: the next one goes on from what is kept."""

    service: Service
    pulls: SqlPulls
    clock: Callable[[], datetime]
    export: Export
    files: Files
    fresh: bool = False

    @property
    def question(self) -> Question:
        """What is asked for."""
        return question_of(self.export.request)

    def step(self, patience: Patience) -> Waiting | None:
        """Ask for what is missing; None when all parts are in `files`. Raises as `Service.ask`, but no MoreParts."""
        while len(self.files) < self.export.parts_count:
            path = self.question.part(len(self.files), self.export.parts_count)
            fresh = self.fresh and self.export.asked_at is None

            def once(path: str = path, *, fresh: bool = fresh) -> Waiting | BinaryIO:
                return self.service.ask(path, fresh=fresh)

            try:
                told = retry(once, patience.policy, patience.pauses, patience.draw)
            except MoreParts:
                self._double()
                continue
            if isinstance(told, Waiting):
                self._heard(told)
                return told
            self.files.append(told)
            self._heard(None)
        return None

    def wait(self, patience: Patience, polling: Polling) -> Waiting | None:
        """Step until all is there or the time is over; then what the service said last."""
        waited_seconds, interval_seconds = 0.0, polling.interval_seconds
        while (told := self.step(patience)) is not None and waited_seconds < polling.timeout_seconds:
            pause_seconds = max(interval_seconds, told.at_least_seconds)
            patience.pauses.pause(pause_seconds)
            waited_seconds += pause_seconds
            interval_seconds = min(interval_seconds * SLOWER, max(polling.longest_seconds, polling.interval_seconds))
        return told

    def finish(self) -> None:
        """The file was taken in."""
        self._save(replace(self.export, done=True))

    def _double(self) -> None:
        """What was fetched is of another division, and goes."""
        self.files.close()
        if self.export.parts_count >= MAX_PARTS:
            raise TooManyParts(
                f"AppMetrica wants more than {MAX_PARTS} parts of {self.question.path[:200]}", "ask for fewer days"
            )
        self._save(replace(self.export, parts_count=self.export.parts_count * 2))

    def _heard(self, told: Waiting | None) -> None:
        if self.export.asked_at is None and (told is None or told.heard):
            self._save(replace(self.export, asked_at=self.clock()))

    def _save(self, export: Export) -> None:
        self.pulls.save(export)
        self.export = export


@contextmanager
def asking(
    service: Service, pulls: SqlPulls, clock: Callable[[], datetime], export: Export, *, fresh: bool
) -> Iterator[Asking]:
    """An export to go on with. `fresh`: unless it is under way already, its file is made anew."""
    now = clock()
    if export.done or (export.asked_at is not None and now - export.asked_at > KEPT_FOR):
        export = replace(export, asked_at=None, done=False)
        pulls.save(export)
    with closing(Files()) as files:
        yield Asking(service, pulls, clock, export, files, fresh)


def keep_question(pulls: SqlPulls, owner: str, question: Question, now: datetime) -> Export:
    """The export of a question, which has a number from now on. Those that were done with long ago go."""
    pulls.forget(SERVICE, owner, now - FORGOTTEN_AFTER)
    return pulls.add(SERVICE, owner, question.text, now)
