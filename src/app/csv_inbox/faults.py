"""Why a file is not merged: for good, or not yet.

Invariant: each fault names what is wrong and, where it is known, the line, the column and the value; each kind of
fault is one of few fixed texts, since the ledger and the metrics count by it.
"""

from dataclasses import dataclass

from app.core.errors import Rejected, Transient

NOT_REGULAR = "not a regular file"
NO_ACCESS = "cannot be opened"
TOO_LARGE = "file too large"
HEADER = "unusable header"
MISSING_COLUMN = "missing column"
NO_ROWS = "no rows"
ENCODING = "invalid text"
RAGGED = "wrong number of fields"
EMPTY_KEY = "unusable key"
LONG_RECORD = "record too long"
OPEN_QUOTE = "quote not closed"
LONE_RETURN = "lone carriage return"
SECOND_HEADER = "second header"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a file; `line`, `column` and `value` where they are known."""

    reason: str
    line: int | None = None
    column: str | None = None
    value: str | None = None


class Unmergeable(Rejected):
    """This file goes to quarantine. `records` are the bad rows as they stand, below the header line `header`.

    `kind` is one of the texts above. `rows` is how many rows were seen before the file was given up.
    """

    def __init__(
        self,
        faults: list[Fault],
        hint: str,
        *,
        kind: str,
        header: bytes = b"",
        records: list[bytes] | None = None,
        more: int = 0,
        rows: int = 0,
    ) -> None:
        first = faults[0]
        where = f"line {first.line}: " if first.line else ""
        others = len(faults) - 1 + more
        super().__init__(f"{where}{first.reason}" + (f" (and {others} more faults)" if others else ""), hint)
        self.faults = faults
        self.kind = kind
        self.header = header
        self.records = records or []
        self.more = more
        self.rows = rows


class Unsteady(Transient):
    """The file changed while it was looked at; it is left for the next run."""


class Stuck(Transient):
    """This one file can be neither read nor moved now; it stays in the inbox, and every run names it."""
