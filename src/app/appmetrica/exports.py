"""Exports under way: the same question again and again until its file is there, however long and over restarts.

Invariants: a question is kept before it is first asked, and asked by the same text until it is done; how many parts it
takes is kept as well; a file that is older than a day is asked for anew, since the service has forgotten it.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import BinaryIO

from app.appmetrica.client import SERVICE, MoreParts, Service, Waiting
from app.appmetrica.questions import Question, question_of
from app.core.errors import Permanent
from app.core.retry import Pauses, RetryPolicy, retry
from app.stores.pulls import Export, SqlPulls

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
