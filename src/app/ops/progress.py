"""How far long work is: a bar on a terminal, a line in the log now and then elsewhere, and always in memory.

Invariant: a tally only grows, and telling of it never slows the work down: one look at a clock per advance.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

LOG_EVERY_SECONDS = 10.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Counts:
    """Units done of those known so far, and rows moved."""

    done: int = 0
    total: int = 0
    rows: int = 0


class Tally:
    """Implements `app.core.runs.Progress` in memory; `told` is called with the new counts after each advance."""

    def __init__(self, told: Callable[[Counts], None]) -> None:
        self._lock = threading.Lock()
        self._told = told
        self._counts = Counts()

    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Add to the counts. From any thread."""
        with self._lock:
            held = self._counts
            self._counts = replace(held, done=held.done + done, total=held.total + total, rows=held.rows + rows)
            self._told(self._counts)

    @property
    def counts(self) -> Counts:
        """The counts so far."""
        return self._counts


def logged(job: str, every_seconds: float = LOG_EVERY_SECONDS) -> Tally:
    """A tally that writes one line to the log every ten seconds of work; short work stays silent."""
    said_at = time.monotonic()

    def told(counts: Counts) -> None:
        nonlocal said_at
        now = time.monotonic()
        if now - said_at >= every_seconds:
            said_at = now
            log.info("%s: %d of %d done, %d rows", job, counts.done, counts.total, counts.rows)

    return Tally(told)


@contextmanager
def bar(job: str, unit: str) -> Iterator[Tally]:
    """A tally shown as a progress bar on stderr, removed at the end."""
    from tqdm import tqdm

    with tqdm(desc=job, unit=unit, leave=False, dynamic_ncols=True) as shown:

        def told(counts: Counts) -> None:
            shown.total = max(counts.total, counts.done) or None
            shown.set_postfix(rows=counts.rows, refresh=False)
            shown.update(counts.done - shown.n)

        yield Tally(told)
