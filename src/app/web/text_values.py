"""Text values that all slices read from requests or write for spreadsheets in the same way."""

import re
from datetime import UTC, datetime

# A plus sign in a query string decodes to a blank: `12:34:56+02:00` arrives as `12:34:56 02:00`, which is unambiguous.
BLANK_FOR_PLUS = re.compile(r"(.*:\d\d(?:[.,]\d+)?) (\d\d:?\d\d)", re.ASCII)
FORMULA = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"
"""Some spreadsheets read a text that begins with one of these as a formula; the last four are full-width."""


def instant(text: str) -> datetime:
    """The UTC datetime of an ISO 8601 text, which is in UTC when it has no offset. Digits below the microsecond are
    rounded, as in rows sent as JSON. Raises ValueError and OverflowError.
    """
    import msgspec

    if found := BLANK_FOR_PLUS.fullmatch(text):
        text = f"{found[1]}+{found[2]}"
    try:
        at: datetime = msgspec.convert(text, datetime)
    except msgspec.ValidationError:
        at = datetime.fromisoformat(text)  # also accepts dates, and times without seconds
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
