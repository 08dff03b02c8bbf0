"""How far back the source has every point, so that one it lacks since then was deleted there and not forgotten."""

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from app.core.shrink import covered_since

if TYPE_CHECKING:
    from app.influx_to_s3.reader import Reader, Retention

Again = Callable[[Callable[[], "Retention"]], "Retention"]


class Coverage:
    """Of one run, in which the source is asked once, when it is first needed. From any thread.

    Where only its oldest point can be told it is asked each time: that moves with each shard group that it drops. A
    clock that is behind the server's would take forgotten points for deleted ones, so the later of both counts.
    """

    def __init__(self, reader: "Reader", again: Again, clock: Callable[[], datetime]) -> None:
        self._reader = reader
        self._again = again
        self._clock = clock
        self._lock = threading.Lock()
        self._known: tuple[Retention, timedelta] | None = None

    def since(self) -> datetime:
        """See `app.core.shrink.covered_since`; to be called after the rows were read."""
        with self._lock:
            if self._known is None or self._known[0].period is None:
                found = self._again(self._reader.retention)
                behind = found.told_at - self._clock() if found.told_at else timedelta()
                self._known = found, max(behind, timedelta())
            found, behind = self._known
        return covered_since(self._clock() + behind, found.period, found.oldest_at)
