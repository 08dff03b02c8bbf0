"""One run of the inbox: what its parts share.

Invariant: what is told to the person who runs it by hand also stands in the inbox's log.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from app.core.runs import Context
from app.csv_inbox.config import InboxConfig
from app.csv_inbox.places import Places

MEBIBYTE = 1 << 20
UNIT = "records"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """One run. `progress` counts MiB."""

    places: Places
    context: Context
    clock: Callable[[], datetime]
    told: list[str] = field(default_factory=list)

    @property
    def config(self) -> InboxConfig:
        """The configuration."""
        return self.places.config

    def tell(self, line: str) -> None:
        """Say it to whoever ran it, and in the log."""
        self.told.append(line)
        log.info("%s", line)

    def beat(self, master: Path | None) -> Callable[[int], None]:
        """Counts bytes as MiB, and is a safe point: until the commit a merge can be given up."""
        self.context.progress.advance(total=master.stat().st_size // MEBIBYTE if master else 0)
        passed = 0

        def beat(size: int) -> None:
            nonlocal passed
            self.context.stop.check()
            before, passed = passed, passed + size
            if passed // MEBIBYTE > before // MEBIBYTE:
                self.context.progress.advance(done=passed // MEBIBYTE - before // MEBIBYTE)

        return beat
