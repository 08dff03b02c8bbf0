"""How many lines of one kind a log takes, so that nobody who can reach the service can fill a disk or push others out.

Invariants: what is left out is counted and told, with the next line or at the end; memory is bounded. Inside a run,
where only its own data make lines, and for callers with a key there is far more room than for everybody else.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

TELL_SECONDS = 60.0
KINDS = 1000


@dataclass(frozen=True, slots=True)
class Allowance:
    """So many lines at once, and so many more a minute."""

    at_once: int
    a_minute: int


IN_RUNS = Allowance(1000, 100)
OF_CALLERS = Allowance(100, 20)
OF_ANYBODY = Allowance(20, 4)
OF_ALL_OF_ANYBODY = Allowance(150, 20)
NOBODY = "nobody"


class _Bucket:
    """An allowance in use. `record` is the last line that was left out."""

    def __init__(self, allowance: Allowance, at: float) -> None:
        self.allowance = allowance
        self._left = float(allowance.at_once)
        self._at = at
        self.left_out = 0
        self.since = at
        self.record: logging.LogRecord | None = None

    def takes(self, at: float) -> bool:
        seconds = max(at - self._at, 0.0)  # the clock may have been set back
        self._at = at
        self._left = min(self._left + seconds * self.allowance.a_minute / 60, float(self.allowance.at_once))
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def count(self, other: "_Bucket") -> None:
        """Tell of what `other` left out, which is forgotten."""
        if other.left_out:
            self.since = self.since if self.left_out else other.since
            self.left_out += other.left_out
            self.record = other.record


class LogLimits:
    """Lines of one kind: of one logger, level and text before its values are put in; of one job, caller and status."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: OrderedDict[tuple[object, ...], _Bucket] = OrderedDict()
        self._of_anybody = _Bucket(OF_ALL_OF_ANYBODY, 0.0)

    def passed(self, record: logging.LogRecord, job: str) -> list[logging.LogRecord]:
        """The lines to write instead of `record`: itself or nothing, and before it what is to be told of others."""
        with self._lock:
            told = list(self._due(record.created))
            bucket = self._bucket(record, job)
            fits = bucket.takes(record.created)
            if fits and bucket.allowance is OF_ANYBODY:
                fits = self._of_anybody.takes(record.created)
            if fits:
                return [*told, record]
            if not bucket.left_out:
                bucket.since = record.created
            bucket.left_out += 1
            bucket.record = record
            return told

    def rest(self) -> list[logging.LogRecord]:
        """What is still to be told when the log is closed."""
        with self._lock:
            return [_summary(each) for each in (self._of_anybody, *self._buckets.values()) if each.left_out]

    def _bucket(self, record: logging.LogRecord, job: str) -> _Bucket:
        who, status = getattr(record, "who", NOBODY), getattr(record, "status", None)
        kind = (record.name, record.levelno, str(record.msg), job, who, status)
        allowance = IN_RUNS if job else OF_ANYBODY if who == NOBODY else OF_CALLERS
        bucket = self._buckets.setdefault(kind, _Bucket(allowance, record.created))
        self._buckets.move_to_end(kind)
        return bucket

    def _due(self, now: float) -> Iterator[logging.LogRecord]:
        while len(self._buckets) > KINDS:
            _, oldest = self._buckets.popitem(last=False)
            self._of_anybody.count(oldest)
        for bucket in (self._of_anybody, *self._buckets.values()):
            if bucket.left_out and not 0 <= now - bucket.since < TELL_SECONDS:
                yield _summary(bucket)


def _summary(bucket: _Bucket) -> logging.LogRecord:
    """A line that stands for those that were left out, the last of which it repeats."""
    last, count = bucket.record, bucket.left_out
    assert last is not None  # noqa: S101 - set with each count
    bucket.left_out, bucket.record = 0, None
    made = logging.makeLogRecord(last.__dict__)
    made.msg, made.args = "%d more lines were left out, the last: %s", (count, last.getMessage())
    made.exc_info = made.exc_text = made.stack_info = None
    return made
