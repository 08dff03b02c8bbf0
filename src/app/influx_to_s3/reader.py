"""The port between the source and a query language: the few questions that an export asks InfluxDB.

Implementations: `flux` (`/api/v2/query`) and `influxql` (`/query`); both give the same rows for the same data.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from app.core.errors import AppError, Permanent, Transient
from app.core.window import Window

if TYPE_CHECKING:
    import pyarrow as pa


# The last one: a field has another type in another shard; a span that ends where the shard does has one type each.
TOO_MUCH = ("memory", "resource exhausted", "schema collision")
UNAUTHORIZED, FORBIDDEN, NOT_FOUND, TIMED_OUT, THROTTLED, CLIENT_CLOSED, SERVER_ERROR = (
    401,
    403,
    404,
    408,
    429,
    499,
    500,
)


class QueryTooLarge(Permanent):
    """The server gave up on the size of the question: repeating it cannot help, a shorter range can."""


@dataclass(frozen=True, slots=True)
class Counted:
    """How often one field of one device occurs in a bucket of time. `device` is "" for points without a device tag."""

    device: str
    start_at: datetime
    field: str
    values: int


class Reader(Protocol):
    """All methods raise Transient, QueryTooLarge (ask for less) or Permanent. Bounds are `[start, end)`, any thread."""

    def devices(self, since: datetime) -> Sequence[str]:
        """Every value of the device tag with points at or after `since`."""

    def counts(self, device: str | None, span: Window, every_seconds: int) -> Iterable[Counted]:
        """Values per device, field and bucket of `every_seconds` on the epoch's grid; empty buckets are left out."""

    def rows(self, device: str, span: Window) -> "Iterator[pa.Table]":
        """All points of the device as canonical tables (`rows.canonical`), in any order; complete, or an error."""

    def measurements(self) -> Sequence[str]:
        """The names of all measurements, sorted; tells an unknown measurement from an empty one."""

    def ping(self) -> str:
        """Ask one cheap question with the configured credentials; what answered, in a few words."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An HTTP error answer. `status` 0 = no secure connection; `where` names the variables to look at."""

    url: str
    status: int
    message: str
    retry_after: str
    where: str


def refusal(refused: Refusal) -> AppError:
    """What to do about an HTTP error; the cases are InfluxDB's own (see `kit/transport/http/error_handler.go`)."""
    told = f"InfluxDB at {refused.url} answers {refused.status}: {refused.message}"
    said = refused.message.lower()
    passing = refused.status in (TIMED_OUT, THROTTLED, CLIENT_CLOSED) or refused.status >= SERVER_ERROR
    if passing or "queue length exceeded" in said:
        asked_seconds = float(refused.retry_after) if refused.retry_after.isdigit() else None
        return Transient(told, "it is tried again by itself", retry_after_seconds=asked_seconds)
    if any(word in said for word in TOO_MUCH):
        return QueryTooLarge(told, "a shorter range is tried by itself")
    hints = {
        0: "no secure connection: check INFLUXDB_URL and its certificate",
        UNAUTHORIZED: "the token is refused: set INFLUXDB_TOKEN to one that may read the data",
        FORBIDDEN: f"give the token the right to read; now {refused.where}",
        NOT_FOUND: f"check {refused.where} and that the token may read it",
    }
    return Permanent(told, hints.get(refused.status, f"check INFLUXDB_URL, {refused.where} and INFLUXDB_MEASUREMENT"))
