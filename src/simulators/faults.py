"""Faults that a simulator plays on the next answers, so that tests and the demo can see what the product makes of them.

Invariant: a fault is taken by exactly one query, in the order in which the faults were added, and only by a query that
its predicate accepts; an answer without a fault is never touched.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock

from simulators.http import CutHere, Piece

CODES = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    404: "not found",
    405: "method not allowed",
    408: "request timeout",
    413: "request too large",
    422: "unprocessable entity",
    429: "too many requests",
    500: "internal error",
    501: "not implemented",
    503: "unavailable",
}


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer with this status at once. `html`: the page of a proxy instead of the server's JSON."""

    status: int
    message: str = "An internal error has occurred - check server logs"
    code: str = ""
    retry_after_seconds: int | None = None
    html: bool = False


@dataclass(frozen=True, slots=True)
class ErrorTable:
    """Send `after_rows` rows (fewer when there are no more), then say inside the answer that the query failed."""

    after_rows: int = 0
    message: str = "engine: unexpected EOF"


@dataclass(frozen=True, slots=True)
class Cut:
    """Send `after_rows` rows, then half of the next one, then close the connection.

    `hidden`: the answer says `Connection: close` and no length, so that its early end looks like an end.
    `mid_row` False ends exactly behind a row.
    """

    after_rows: int = 0
    hidden: bool = False
    mid_row: bool = True


@dataclass(frozen=True, slots=True)
class Stall:
    """Send nothing for that long: before the status when `after_rows` is None, else after so many rows."""

    seconds: float
    after_rows: int | None = None


@dataclass(frozen=True, slots=True)
class ForceGzip:
    """Compress the answer however short it is, and also when nobody asked."""


@dataclass(frozen=True, slots=True)
class EmptyTable:
    """Put a table without rows, of this group key, before the others."""

    key: tuple[tuple[str, str], ...] = (("device_id", "D1"),)


Fault = Refuse | ErrorTable | Cut | Stall | ForceGzip | EmptyTable
Predicate = Callable[[str], bool]


class Faults:
    """Faults that wait for a query. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: list[tuple[Fault, Predicate]] = []

    def add(self, fault: Fault, times: int = 1, when: Predicate = lambda _text: True) -> None:
        """The next `times` queries whose text `when` accepts get the fault."""
        with self._lock:
            self._waiting.extend([(fault, when)] * times)

    def take(self, text: str) -> Fault | None:
        """The fault for this query, which is then spent."""
        with self._lock:
            for number, (fault, when) in enumerate(self._waiting):
                if when(text):
                    del self._waiting[number]
                    return fault
        return None

    def clear(self) -> None:
        """Forget what still waits."""
        with self._lock:
            self._waiting.clear()

    def __len__(self) -> int:
        """How many still wait."""
        with self._lock:
            return len(self._waiting)


def disturbed(
    pieces: Iterator[Piece],
    fault: Fault | None,
    error: Callable[[str], bytes],
    wait: Callable[[float], object],
) -> Iterator[Piece]:
    """The pieces with the fault in them, struck at the first one whose rows are too many. Raises CutHere to close.

    Ask for pieces of one row each where a fault has an `after_rows`.
    """
    after_rows = getattr(fault, "after_rows", None)
    if after_rows is None:
        yield from pieces
        return
    rows = 0
    for piece in pieces:
        if piece.rows and rows + piece.rows > after_rows:
            yield from _struck(fault, piece, error, wait)
            if not isinstance(fault, Stall):
                return
            yield piece
            yield from pieces
            return
        if isinstance(fault, Cut | ErrorTable) and _ends(piece):
            break
        rows += piece.rows
        yield piece
    yield from _struck(fault, Piece(b""), error, wait)


def _ends(piece: Piece) -> bool:
    return piece.data == b"\r\n"


def _struck(
    fault: Fault | None,
    piece: Piece,
    error: Callable[[str], bytes],
    wait: Callable[[float], object],
) -> Iterator[Piece]:
    if isinstance(fault, Stall):
        wait(fault.seconds)
    elif isinstance(fault, ErrorTable):
        yield Piece(error(fault.message))
    elif isinstance(fault, Cut):
        if fault.mid_row and piece.data:
            yield Piece(piece.data[: len(piece.data) // 2])
        raise CutHere
