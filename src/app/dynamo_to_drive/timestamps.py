"""The instant of a row, from the text or the number that the table holds, and the bounds of an hour in the same form.

Invariant: text and bounds agree: what `in_hour` finds by prefix or range is exactly what `instant_of` puts into that
hour, for every writing of UTC (`Z`, `+00:00`, none, any fraction).
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from itertools import islice
from operator import lt

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


def ascend(texts: Sequence[str]) -> bool:
    """True when the texts are of one form and each is later than the one before, so that their ranks ascend as well.

    False says nothing. It asks for the forms that machines write, and takes a tenth of the time of ranks.
    """
    lengths = set(map(len, texts))
    if len(lengths) != 1 or not all(map(lt, texts, islice(texts, 1, None))):
        return False
    joined, length = "".join(texts), lengths.pop()
    if _are_digits(joined):
        return True
    if length < len("YYYY-MM-DDTHH:MM:SS"):
        return False
    # A column of the texts at a time: what stands at one place in each of them.
    across = [joined[place::length] for place in (4, *range(19, length))]
    alike = [len(set(column)) == 1 for column in across]
    if across[0][:1] != "-" or not alike[0]:
        return False
    if across[1:] and across[1][0] == ".":
        return alike[1] and across[-1][0] == "Z" and alike[-1] and _are_digits("".join(across[2:-1]))
    return all(alike)


def _are_digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


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


def number_before(hour_end: str) -> Callable[[str], bool]:
    """Whether a cell is a number before that one; text, which was asked for by prefix, always is."""
    end = Decimal(hour_end)

    def is_before(text: str) -> bool:
        try:
            return Decimal(text) < end
        except InvalidOperation:
            return True

    return is_before


def separator_of(text: str) -> str:
    """`T` or a space, as the data has it. Raises Rejected for text whose order is not that of time."""
    if len(text) > 10 and text[4] == text[7] == "-" and text[10] in "T ":  # noqa: PLR2004 - YYYY-MM-DDTHH
        return text[10]
    raise Rejected(
        f"timestamp {text[:40]!r} is not ISO 8601 in the form YYYY-MM-DDTHH:MM:SSZ",
        "set DYNAMODB_TIMESTAMP_ATTRIBUTE to an attribute in that form, or to epoch numbers",
    )
