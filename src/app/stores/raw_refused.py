"""Lines of a service's files that no event could be made of, on their way to where they are set aside.

Invariants: the bytes stay as they came; memory is bounded by one line, since what is refused lies on disk until it is
kept; a line is kept under the window that it belongs to, so that a window that is pulled again adds nothing.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, cast

from app.core.ledger import SetAside
from app.stores.set_aside import LINES, SetAsideStore

LARGE_BYTES = 1 << 20
Name = tuple[str, ...]


@dataclass(slots=True)
class _Refused:
    file: BinaryIO
    sample: str
    number: int = 0


class RefusedLines:
    """Close it when it is done with. For one thread."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._found: dict[tuple[Name, str], _Refused] = {}
        self.not_kept = 0

    def add(self, name: Name, reason: str, line: bytes, sample: str) -> None:
        """Take in a line of the window `name`. A large one gets an object of its own, so that none is cut."""
        if len(line) > LARGE_BYTES:
            name = (*name, hashlib.sha256(line).hexdigest()[:16])
        found = self._found.get((name, reason))
        if found is None:
            file = cast("BinaryIO", TemporaryFile(dir=self._spool))  # noqa: SIM115 - `close` closes it
            found = self._found[name, reason] = _Refused(file, sample)
        found.file.write(line.rstrip(b"\r\n") + b"\n")
        found.number += 1

    def keep(self, store: SetAsideStore) -> list[SetAside]:
        """Keep all, as lines of a ledger. `not_kept` is then how many the store could not be given."""
        entries = []
        for (name, reason), found in self._found.items():
            found.file.seek(0)
            kept = store.keep(
                name, found.file, content_type=LINES, reason=reason, number=found.number, sample=found.sample
            )
            self.not_kept += 0 if kept.key else kept.number
            entries.append(kept.entry)
        return entries

    def close(self) -> None:
        """Free what is spooled. Idempotent."""
        while self._found:
            self._found.popitem()[1].file.close()
