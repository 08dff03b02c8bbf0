"""Values on their way into and out of SQL: instants are aware UTC, text is what every database can hold.

Invariant: SQLite's text form of an instant has a fixed width, so that its order as text is its order in time.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from app.core.errors import Rejected

UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")
INSTANT_SUFFIX = "_at"


def bound(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with instants in UTC. Raises Rejected for text with a NUL or a lone surrogate, which PostgreSQL
    refuses and SQLite would keep: both dialects take the same values. Raises ValueError for a naive datetime.
    """
    return {name: _bound(name, value) for name, value in params.items()}


def _bound(name: str, value: Any) -> Any:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"{name} must be an aware datetime, not {value}")
        return value.astimezone(UTC)
    if isinstance(value, str) and UNSTORABLE.search(value):
        raise Rejected(
            f"{name} {value[:60]!r} holds a NUL or a lone surrogate", "no database stores such text: correct the value"
        )
    return value


def storable(text: str) -> str:
    r"""Text for a message column: what no database stores is shown as `\x00`, `\ud800`."""
    return UNSTORABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def instant_text(instant: datetime) -> str:
    """`YYYY-MM-DDTHH:MM:SS.ffffffZ` of an instant in UTC."""
    return instant.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def instant_of(text: str) -> datetime:
    """The aware UTC instant of its text form."""
    return datetime.fromisoformat(text)
