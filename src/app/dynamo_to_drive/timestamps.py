"""The instant of a row, from the text or the number that the table holds, and the bounds of an hour in the same form.

Invariant: text and bounds agree: what `in_hour` finds by prefix or range is exactly what `instant_of` puts into that
hour, for every writing of UTC (`Z`, `+00:00`, none, any fraction).
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation

from app.core.errors import Rejected
from app.core.window import EPOCH, Window

PER_SECOND = {"s": 1, "ms": 1000, "us": 1_000_000}
MAX_NUMBER = 10**20
MICROSECOND = timedelta(microseconds=1)


def reader_of(unit: str) -> Callable[[str], datetime | None]:
    """What turns a cell into an aware UTC instant; None for text that is no instant. `unit` is that of numbers."""
    per_microsecond = Decimal(1_000_000) / PER_SECOND[unit]

    def instant_of(text: str) -> datetime | None:
        # Thirteen digits may look like a date without hyphens to the parser: what has neither - nor T is a number.
        if text[4:5] != "-" and "T" not in text:
            return _numbered(text, per_microsecond)
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            return None
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)

    return instant_of


def rank(text: str) -> tuple[str, str]:
    """What texts of one form sort by in order of time: whole seconds, then the fraction, whatever its length.

    Text that is no instant sorts as it is, so that a row with a broken timestamp has a place and is not dropped.
    """
    if text[4:5] == "-" or "T" in text:
        rest = text[19:]
        if rest[:1] != ".":
            return text[:19], ""
        if rest[-1] == "Z":
            return text[:19], rest[1:-1].rstrip("0")
        return text[:19], rest[1:].partition("+")[0].rstrip("0")
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text, ""
    if not 0 <= number < MAX_NUMBER:
        return text, ""
    whole = int(number)
    return f"{whole:020d}", f"{number - whole:f}"[2:].rstrip("0")


def _numbered(text: str, per_microsecond: Decimal) -> datetime | None:
    try:
        return EPOCH + int(Decimal(text) * per_microsecond // 1) * MICROSECOND
    except (InvalidOperation, OverflowError, ValueError):
        return None


def hour_prefix(hour: Window, separator: str) -> str:
    """What every ISO 8601 text of this hour in UTC begins with, whatever its fraction and its writing of the zone."""
    return f"{hour.start:%Y-%m-%d}{separator}{hour.start:%H}"


def hour_numbers(hour: Window, unit: str) -> tuple[str, str]:
    """Start and end of the hour as numbers. BETWEEN includes the end, so the reader drops it."""
    per_second = PER_SECOND[unit]
    first, last = ((at - EPOCH) // timedelta(seconds=1) * per_second for at in (hour.start, hour.end))
    return str(first), str(last)


def separator_of(text: str) -> str:
    """`T` or a space, as the data has it. Raises Rejected for text whose order is not that of time."""
    if len(text) > 10 and text[4] == text[7] == "-" and text[10] in "T ":  # noqa: PLR2004 - YYYY-MM-DDTHH
        return text[10]
    raise Rejected(
        f"timestamp {text[:40]!r} is not ISO 8601 in the form YYYY-MM-DDTHH:MM:SSZ",
        "set DYNAMODB_TIMESTAMP_ATTRIBUTE to an attribute in that form, or to epoch numbers",
    )
