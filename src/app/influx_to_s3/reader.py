"""The port between the source and a query language: the few questions that an export asks InfluxDB.

Implementations: `flux` (`/api/v2/query`) and `influxql` (`/query`); both give the same points for the same data.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from app.core.errors import AppError, Permanent, Transient
from app.core.ports import Sums
from app.core.window import Window

if TYPE_CHECKING:
    import pyarrow as pa


# `schema collision`: a field has several types in the span. `max-select`: limits of 1.x on series, buckets and points.
TOO_MUCH = ("memory", "resource exhausted", "schema collision", "max-select")
UNAUTHORIZED, FORBIDDEN, NOT_FOUND, TIMED_OUT, THROTTLED, CLIENT_CLOSED, SERVER_ERROR, NOT_IMPLEMENTED = (
    401,
    403,
    404,
    408,
    429,
    499,
    500,
    501,
)
INVENTORY_DEVICES = 20


class QueryTooLarge(Permanent):
    """The server gave up on the size of the question: repeating it cannot help, a shorter range can."""


@dataclass(frozen=True, slots=True)
class Counted:
    """How often one field of one device occurs in a bucket of time. `device` is "" for points without a device tag."""

    device: str
    start_at: datetime
    field: str
    values: int


@dataclass(frozen=True, slots=True)
class Summed:
    """What the values of one field come to in a bucket of time, or a part of that; parts add up."""

    start_at: datetime
    field: str
    sums: Sums


@dataclass(frozen=True, slots=True)
class Points:
    """Points of one or more series as columns of one length, in any order.

    `times`: timestamp("ns", "UTC"). `tags`: tag key -> text column, null = the series lacks the tag; the device tag
    itself is left out. `fields`: (field key, column) of float64, int64, uint64, string or bool, null = absent; a key
    stands there once for each of its types, and at most one of them is not null in a row.
    """

    times: "pa.Array | pa.ChunkedArray"
    tags: "Mapping[str, pa.Array | pa.ChunkedArray]"
    fields: "Sequence[tuple[str, pa.Array | pa.ChunkedArray]]"


@dataclass(frozen=True, slots=True)
class Retention:
    """How long the source keeps points: `period`, which may be UNLIMITED (see `app.core.shrink`).

    None where it cannot be asked; then `oldest_at` is the oldest point of the measurement, None where there is none or
    it cannot be found. `told_at`: the server's clock at the answer, None where it does not tell.
    """

    period: timedelta | None
    oldest_at: datetime | None = None
    told_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the source holds, to tell a wrong setting from an empty source. All names are sorted.

    `has_points`: of the configured measurement, in the configured bucket or retention policy, at any time. `tags` and
    `fields` are those of the measurement, `devices` at most INVENTORY_DEVICES values of the device tag at any time.
    `policies`: other retention policies in which the measurement has points (InfluxQL only).
    """

    measurements: Sequence[str]
    has_points: bool
    tags: Sequence[str]
    fields: Sequence[str]
    devices: Sequence[str]
    policies: Sequence[str] = ()


class Reader(Protocol):
    """All methods raise Transient, QueryTooLarge (ask for less) or Permanent. Bounds are `[start, end)`, any thread.

    The device "" stands for the points without the device tag. Values keep the type under which they are stored.
    """

    def devices(self, since: datetime) -> Sequence[str]:
        """Every value of the device tag with points at or after `since`, also in the future; sorted."""

    def counts(self, device: str | None, span: Window, every_seconds: int) -> Iterable[Counted]:
        """Values per device, field and bucket of `every_seconds` on the epoch's grid; empty buckets are left out.

        None asks for all devices. Exact also where the type of a field differs between shards: one field of one bucket
        may then come in several parts, which add up.
        """

    def sums(self, device: str, span: Window, every_seconds: int, numbers: Sequence[str]) -> Iterable[Summed]:
        """As `counts` of one device, with sum, least and greatest of the numeric fields `numbers`, perhaps of others.

        Permanent or Transient also where a sum cannot be written, or one of `numbers` is no number in the span.
        """

    def rows(self, device: str, span: Window) -> "Iterator[Points]":
        """All points of the device, complete or an error."""

    def empty_texts(self, device: str, span: Window, field: str) -> "Iterator[Points]":
        """The points whose text `field` is "", with that field alone, where `rows` gives null for them.

        Flux's pivoted CSV writes both as an empty cell. InfluxQL tells them apart: nothing comes then.
        """

    def outside(self, span: Window) -> Iterable[Counted]:
        """Values per device and field of a long span as one bucket that starts with it; the far future or 1970, say.

        A field that has several types in the span may be counted under one of them only.
        """

    def retention(self) -> Retention:
        """How long points are kept, asked anew each time: it may be changed at any time."""

    def inventory(self) -> Inventory:
        """What there is; costs several questions, to be asked when nothing was found."""

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
    passing = refused.status in (TIMED_OUT, THROTTLED, CLIENT_CLOSED) or (
        refused.status >= SERVER_ERROR and refused.status != NOT_IMPLEMENTED
    )
    if passing or "queue length exceeded" in said:
        asked_seconds = float(refused.retry_after) if refused.retry_after.isdigit() else None
        return Transient(told, "no action needed: it is retried", retry_after_seconds=asked_seconds)
    if any(word in said for word in TOO_MUCH):
        return QueryTooLarge(told, "no action needed: a shorter range is tried")
    hints = {
        0: "check INFLUXDB_URL and the certificate of the server",
        UNAUTHORIZED: "set INFLUXDB_TOKEN, or the user name and password, to credentials that may read the data",
        FORBIDDEN: f"give the token the right to read; now {refused.where}",
        NOT_FOUND: f"check {refused.where} and that the token may read it",
    }
    return Permanent(told, hints.get(refused.status, f"check INFLUXDB_URL, {refused.where} and INFLUXDB_MEASUREMENT"))
