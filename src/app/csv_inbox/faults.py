"""Why a file is not merged: for good, or not yet.

Invariant: each fault names what is wrong and, where it is known, the line, the column and the value.
"""

from dataclasses import dataclass

from app.core.errors import Rejected, Transient


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a file; `line`, `column` and `value` where they are known."""

    reason: str
    line: int | None = None
    column: str | None = None
    value: str | None = None


class Unmergeable(Rejected):
    """This file goes to quarantine. `records` are the bad rows as they stand, below the header line `header`."""

    def __init__(
        self, faults: list[Fault], hint: str, header: bytes = b"", records: list[bytes] | None = None, more: int = 0
    ) -> None:
        first = faults[0]
        where = f"line {first.line}: " if first.line else ""
        others = len(faults) - 1 + more
        super().__init__(f"{where}{first.reason}" + (f" (and {others} more faults)" if others else ""), hint)
        self.faults = faults
        self.header = header
        self.records = records or []
        self.more = more


class Unsteady(Transient):
    """The file changed while it was looked at; it is left for the next run."""
