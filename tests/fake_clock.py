"""A wall clock that a test sets, for processes of its own; their monotonic clock is the machine's."""

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from needs import faketime_library


class FakeClock:
    """Processes with this `environ` read their time from `file`."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @property
    def environ(self) -> dict[str, str]:
        names = ("FAKETIME_DONT_FAKE_MONOTONIC", "DONT_FAKE_MONOTONIC", "FAKETIME_NO_CACHE")
        library = str(faketime_library())
        # With its mend of waits on the monotonic clock, Python's threads wait for each other without a pause.
        given = {**dict.fromkeys(names, "1"), "FAKETIME_FORCE_MONOTONIC_FIX": "0"}
        return {"LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(self._file), **given}

    def set(self, ahead: timedelta) -> None:
        """Ahead of this machine's clock, from the next look at it on. The file is never empty: that would be now."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{ahead.total_seconds():+.0f}s")
        new.replace(self._file)


class RightTime:
    """The time that is right in a world where it passes as the test likes: `ahead` of this machine's."""

    def __init__(self, ahead: timedelta, clocks: Sequence[FakeClock]) -> None:
        self.ahead = ahead
        self.clocks = clocks
        self.go_on(0)

    def now_ns(self) -> int:
        """Nanoseconds since the epoch."""
        return time.time_ns() + self.ahead // timedelta(microseconds=1) * 1000

    def go_on(self, seconds: float) -> None:
        """So much passes at once; all clocks are right then."""
        self.ahead += timedelta(seconds=seconds)
        for clock in self.clocks:
            clock.set(self.ahead)
