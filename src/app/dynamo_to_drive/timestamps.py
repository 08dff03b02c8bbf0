"""Timestamp formats in DynamoDB attributes: how to parse them, how to order them, and their sort key ranges.

Pure functions over text and windows. Invariant: each text that `TimestampReader.read` can parse, and that has no traits
other than the given ones, lies in a range from `text_ranges` or `number_ranges` for its hour. A range may contain other
texts as well; parsing sorts them out.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal
from enum import Enum
from itertools import islice
from math import floor
from operator import lt
from typing import NamedTuple

from app.core.windows import DAY_SECONDS, EPOCH, HOUR_SECONDS, Window, floor_to, window_at

AUTO = "auto"
DIGITS = {"s": 0, "ms": 3, "us": 6}
"""Decimal digits below the second, by unit; smaller units come later."""
PLAUSIBLE = (10**9, 10**10)
"""Seconds from 2001 to 2286: in these years the size of a number tells its unit."""
YEARS = range(2, 9999)  # leaves room for the hours before and after
FURTHEST = timedelta(hours=14)  # the largest UTC offset on earth

NO_ATTRIBUTE = "no timestamp attribute"
UNREADABLE = "unreadable timestamp"
OUTSIDE = "outside the range"

LAST = "\U0010ffff"  # sorts behind every character
MAX_NUMBER_CHARACTERS = 160  # DynamoDB's largest number has 126 digits
EXACT = Context(prec=MAX_NUMBER_CHARACTERS * 2)

ISO = re.compile(
    r"([0-9]{4})(-?)([0-9]{2})\2([0-9]{2})([Tt ])"
    r"([0-9]{2})(?::?([0-9]{2})(?::?([0-9]{2})(?:[.,]([0-9]+))?)?)?"
    r"(?: ?(?:Z|z|UTC|GMT|([+-])([0-9]{2})(?::?([0-9]{2}))?(?: UTC| GMT)?))? *"
)
PLAIN = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-5][0-9](?:\.([0-9]+))?(?:Z|\+00:00)?")
NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,4})?")
NUMBER_LENGTHS = (10, 13, 16)


class TextTrait(Enum):
    """Why a text does not begin like its hour in UTC. The ranges for a trait are queried once it has been seen."""

    OFFSET = "an offset other than UTC"
    LOWER_T = "a small t between date and time"
    BASIC = "a date without hyphens"


EVERY_TRAIT = frozenset(TextTrait)
PLAINLY: frozenset[TextTrait] = frozenset()


class TimestampReading(NamedTuple):
    """A parsed timestamp. `at` has microsecond precision; None if the text is unreadable, and `reason` says why.

    `fraction` has all digits below the second, without trailing zeros.
    """

    at: datetime | None
    fraction: str = ""
    reason: str = ""
    traits: frozenset[TextTrait] = PLAINLY


class KeyRange(NamedTuple):
    """An inclusive range of a sort key."""

    low: str
    high: str


@dataclass(frozen=True, slots=True)
class TimestampReader:
    """Parses timestamps. `unit` is the unit of numbers; AUTO = by each number's size, for the years of PLAUSIBLE."""

    unit: str = AUTO

    def read(self, text: str) -> TimestampReading:
        """Parse `text`: ISO 8601 with or without a zone (then UTC), or a number of units since 1970."""
        if found := ISO.fullmatch(text):
            return _calendar(found)
        if len(text) <= MAX_NUMBER_CHARACTERS and NUMBER.fullmatch(text):
            return self._counted(Decimal(text))
        return TimestampReading(None, reason=UNREADABLE)

    def _counted(self, number: Decimal) -> TimestampReading:
        looks = unit_of(number)
        unit = looks if self.unit == AUTO else self.unit
        if looks not in ("", unit) or not unit:
            return TimestampReading(None, reason=OUTSIDE)
        seconds = EXACT.scaleb(number, -DIGITS[unit])
        if not abs(seconds) < PLAUSIBLE[1] * 100:  # before `floor` turns 1E+125 into an integer
            return TimestampReading(None, reason=OUTSIDE)
        whole = floor(seconds)
        fraction = f"{abs(EXACT.subtract(seconds, whole)):f}"[2:].rstrip("0")  # abs: -0 has a sign
        return _at(EPOCH, timedelta(seconds=whole), fraction)

    def rank(self, text: str) -> tuple[str, str]:
        """A sort key by time for texts of any format: the second in UTC, then the fraction.

        Unreadable text sorts as it is, so that a row that only a file still has keeps a place.
        """
        if plain := PLAIN.fullmatch(text):
            return f"{text[:10]}T{text[11:19]}", (plain[1] or "").rstrip("0")
        at, fraction, _, _ = self.read(text)
        if at is None:
            return (f"{text[:10]}T{text[11:]}" if text[10:11] in (" ", "t") else text), ""
        return at.isoformat()[:19], fraction

    def other_unit(self, text: str) -> str:
        """The unit that a number's size suggests if it differs from the set unit; "" if they agree or it is unclear."""
        if self.unit == AUTO or len(text) > MAX_NUMBER_CHARACTERS or not NUMBER.fullmatch(text):
            return ""
        looks = unit_of(Decimal(text))
        return "" if looks == self.unit else looks


def unit_of(number: Decimal) -> str:
    """The unit in which the number is a date within PLAUSIBLE; "" if there is none."""
    low, high = PLAUSIBLE
    return next((unit for unit, digits in DIGITS.items() if low * 10**digits <= number < high * 10**digits), "")


def _calendar(found: re.Match[str]) -> TimestampReading:
    year, hyphen, month, day, between, hour, minute, second, fraction, sign, *offset = found.groups()
    digits, seconds = (fraction or "").rstrip("0"), int(second or 0)
    if seconds == 60:  # noqa: PLR2004 - a leap second stays in its own hour, after every other timestamp
        seconds, digits = 59, f"999999999{digits}"
    hours, minutes = (int(each or 0) for each in offset)
    away = timedelta(hours=hours, minutes=minutes) * (-1 if sign == "-" else 1)
    try:
        local = datetime(int(year), int(month), int(day), int(hour), int(minute or 0), seconds, tzinfo=UTC)
    except ValueError:
        return TimestampReading(None, reason=UNREADABLE)
    if abs(away) > FURTHEST or minutes >= 60:  # noqa: PLR2004 - minutes of an hour
        return TimestampReading(None, reason=UNREADABLE)
    traits = {TextTrait.OFFSET: bool(away), TextTrait.LOWER_T: between == "t", TextTrait.BASIC: not hyphen}
    if not any(traits.values()):
        return _at(local, timedelta(), digits)
    return _at(local, -away, digits)._replace(traits=frozenset(trait for trait, has in traits.items() if has))


def _at(start: datetime, passed: timedelta, fraction: str) -> TimestampReading:
    try:
        at = start + passed + timedelta(microseconds=int(fraction[:6].ljust(6, "0")))
    except OverflowError:
        return TimestampReading(None, reason=OUTSIDE)
    return TimestampReading(at, fraction) if at.year in YEARS else TimestampReading(None, reason=OUTSIDE)


class HourTexts:
    """Decides which texts are timestamps of one hour; recognises machine formats in bulk, without parsing each text.

    `beginnings` are the prefixes of the hour's texts in UTC.
    """

    def __init__(self, times: TimestampReader, window: Window) -> None:
        self._times = times
        self._window = window
        day, hour = window.start.isoformat()[:10], f"{window.start:%H}"
        self.beginnings = f"{day}T{hour}", f"{day} {hour}"
        # Matches many texts at once, one per line, in a third of the time of matching each.
        self._plain = re.compile(rf"(?:{day}[T ]{hour}:[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:Z|\+00:00)?\n)*+")
        bounds = {unit: _bounds(window, unit) for unit in (DIGITS if times.unit == AUTO else (times.unit,))}
        self._numbers = {
            len(high): (low, high) for unit, (low, high) in bounds.items() if unit_of(Decimal(low)) == unit
        }

    def has_all(self, texts: Sequence[str]) -> bool:
        """True if all texts are certainly of this hour. False means unknown."""
        lines = "\n".join([*texts, ""])
        if self._plain.fullmatch(lines):
            return lines.count("\n") == len(texts)
        low, high = self._numbers.get(len(texts[0]), ("", ""))
        are_alike = {len(low)} == {len(high)} == set(map(len, texts)) and _are_digits("".join(texts))
        return are_alike and low <= min(texts) and max(texts) < high

    def place(self, text: str) -> tuple[bool, TimestampReading]:
        """Whether `text` is of this hour, and its parsed timestamp."""
        reading = self._times.read(text)
        return reading.at is not None and self._window.start <= reading.at < self._window.end, reading


def _bounds(hour: Window, unit: str) -> tuple[str, str]:
    """The start and end of the hour as numbers in the unit."""
    first, last = ((at - EPOCH) // timedelta(seconds=1) * 10 ** DIGITS[unit] for at in (hour.start, hour.end))
    return str(first), str(last)


def number_ranges(hour: Window, unit: str, newest: str = "") -> Iterator[KeyRange]:
    """The ranges of a numeric sort key for the hour. With AUTO, one per unit up to that of the `newest` number, since
    there are no numbers in smaller units then. Each range includes the end of the hour.
    """
    if unit != AUTO:
        yield KeyRange(*_bounds(hour, unit))
        return
    largest = unit_of(Decimal(newest)) if newest else ""
    for each in DIGITS:
        yield KeyRange(*_bounds(hour, each))
        if each == largest:
            return


def text_ranges(hour: Window, traits: Collection[TextTrait]) -> Iterator[KeyRange]:
    """The ranges of a text sort key for the hour: ISO 8601 with T and with a space, and numbers of any unit, which all
    begin with the digits of their second; also texts with one of `traits`, and with every trait the whole day.
    """
    start, end = hour.start, hour.end
    own_day = start.isoformat()[:10] if EVERY_TRAIT.issubset(traits) else ""
    if TextTrait.OFFSET in traits:
        start, end = start - FURTHEST, end + FURTHEST
    for day, first, last in _days(start, end):
        for written in (day, day.replace("-", "")) if TextTrait.BASIC in traits else (day,):
            if day == own_day:  # includes texts without a valid hour: a date alone, `noon`, 24:00
                yield KeyRange(written, f"{written}{LAST}")
                continue
            for between in "T t" if TextTrait.LOWER_T in traits else "T ":
                begin = f"{written}{between}"
                yield KeyRange(f"{begin}{first:02d}", f"{begin}{last:02d}{LAST}")
    low, high = ((at - EPOCH) // timedelta(seconds=1) for at in (hour.start, hour.end - timedelta(seconds=1)))
    if low >= 0 and len(str(low)) == len(str(high)):
        yield KeyRange(str(low), f"{high}{LAST}")
    elif low >= 0:  # the numbers gain a digit within this hour
        yield KeyRange(str(low), f"{'9' * len(str(low))}{LAST}")
        yield KeyRange(f"1{'0' * len(str(low))}", f"{high}{LAST}")


def _days(start: datetime, end: datetime) -> Iterator[tuple[str, int, int]]:
    """The days (YYYY-MM-DD) of `[start, end)`, which has whole hours, each with its first and last hour."""
    while start < end:
        until = min(end, floor_to(start, DAY_SECONDS) + timedelta(days=1))
        yield start.isoformat()[:10], start.hour, (until - timedelta(hours=1)).hour
        start = until


def is_found(times: TimestampReader, text: str, *, is_text: bool) -> bool:
    """Whether a sort key is readable and lies in the ranges of its hour with every trait."""
    at = times.read(text).at
    if at is None or not is_text:
        return at is not None
    return any(low <= text <= high for low, high in text_ranges(window_at(at, HOUR_SECONDS), EVERY_TRAIT))


def ascend(texts: Sequence[str]) -> bool:
    """True if the texts have one format and strictly ascend, so that their ranks ascend too. False means unknown.

    Recognises only machine formats, in a fraction of the time of computing ranks.
    """
    if len(set(map(len, texts))) != 1 or not all(map(lt, texts, islice(texts, 1, None))):
        return False
    first = texts[0]
    if PLAIN.fullmatch(first):
        digits = first.removesuffix("+00:00")
        form = re.sub("[0-9]", "[0-9]", re.escape(digits)) + re.escape(first[len(digits) :])
        return re.fullmatch(rf"(?:{form}\n)*+", "\n".join([*texts, ""])) is not None
    return len(first) in NUMBER_LENGTHS and first[0] != "0" and _are_digits("".join(texts))


def _are_digits(text: str) -> bool:
    return text.isascii() and text.isdigit()
