"""Headwater's data as pandas DataFrames, for notebooks; the daemon never imports this.

    from app.frames import Headwater

    headwater = Headwater("http://127.0.0.1:8080", "hw_notebook_...")
    headwater.telemetry("D1", "2026-02-01", "2026-02-08")
    headwater.table("events-part", platform="iOS")
    headwater.report("daily-summary", device_id="D1")

Needs `headwater[frames]`. Responses are Parquet, so column types are those of the daemon: timestamps are aware UTC,
integers stay integers beside nulls (Int64), flags are boolean, text is str.
"""

import io
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from app.core.errors import AppError, Permanent, Rejected, Transient

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Headwater"]

PAGE_ROWS = 100_000
NEXT = re.compile(r'<([^>]*)>\s*;\s*rel="?next"?')
AGAIN = frozenset({429, 503})
Instant = datetime | date | str
"""A str is ISO 8601; without an offset it is UTC."""


class _NoRedirects(HTTPRedirectHandler):
    """Sends the key only to the daemon, never to a redirect target."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow no redirect."""


@dataclass(frozen=True, slots=True)
class Headwater:
    """A daemon at `url`; `key` needs `analytics:read`, and `dwh:read` for tables. While the daemon is busy or still
    reads its objects for the first time, requests are retried for up to `timeout_seconds`.
    """

    url: str
    key: str = field(default="", repr=False)
    timeout_seconds: float = 120.0

    def telemetry(self, device_id: str, start: Instant | None = None, end: Instant | None = None) -> "pd.DataFrame":
        """The rows of a device from `start` to before `end`, oldest first. `timestamp` is in microseconds, or in
        nanoseconds when a row has digits below the microsecond.
        """
        import pandas as pd

        frame = self._frame("/analytics/rows", {"device_id": device_id, "from": start, "to": end})
        below = frame.pop("timestamp_nanos")
        if below.notna().any():
            frame["timestamp"] = frame["timestamp"].dt.as_unit("ns") + pd.to_timedelta(below.fillna(0), unit="ns")
        return frame

    def table(self, name: str, **filters: Any) -> "pd.DataFrame":
        """All rows of a warehouse table, newest first; follows pagination. `filters` are those of GET /dwh, such as
        `platform="iOS"`. JSON columns contain JSON text.
        """
        return self._frame(f"/dwh/{quote(name, safe='')}", {"limit": PAGE_ROWS, **filters})

    def report(
        self, name: str, start: Instant | None = None, end: Instant | None = None, **parameters: Any
    ) -> "pd.DataFrame":
        """The result of a report, such as `daily-summary`; `start` and `end` become its parameters `from` and `to`."""
        return self._frame(f"/analytics/{quote(name)}", {"from": start, "to": end, **parameters})

    def _frame(self, path: str, query: Mapping[str, Any]) -> "pd.DataFrame":
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq

        sent = {name: _text(value) for name, value in query.items() if value is not None}
        first = f"{self.url.rstrip('/')}{path}?{urlencode({**sent, 'format': 'parquet'})}"
        table = pa.concat_tables(
            [pq.read_table(io.BytesIO(page)) for page in self._pages(first)], promote_options="permissive"
        )
        nullable = {
            pa.int16(): pd.Int16Dtype(),
            pa.int32(): pd.Int32Dtype(),
            pa.int64(): pd.Int64Dtype(),
            pa.bool_(): pd.BooleanDtype(),
        }
        frame: pd.DataFrame = table.to_pandas(types_mapper=nullable.get, date_as_object=False)
        return frame

    def _pages(self, url: str | None) -> Iterator[bytes]:
        """The response bodies of all pages, following `Link: rel="next"`."""
        while url is not None:
            body, links = self._get(url)
            yield body
            following = NEXT.search(links)
            url = urljoin(url, following[1]) if following else None
            if url and urlsplit(url).netloc != urlsplit(self.url).netloc:
                raise Permanent(f"the next page is at another host: {url}", "use the daemon's own address as url")

    def _get(self, url: str) -> tuple[bytes, str]:
        """Body and `Link` header. Raises Transient, Rejected or Permanent with the daemon's error."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        until = time.monotonic() + self.timeout_seconds
        while True:
            try:
                request = Request(url, headers=headers)  # noqa: S310 - the URL that the caller gave
                with build_opener(_NoRedirects).open(request, timeout=self.timeout_seconds) as answer:
                    return answer.read(), answer.headers.get("Link", "")
            except HTTPError as error:
                given = error.headers.get("Retry-After", "")
                seconds = float(given) if given.isdecimal() else 1.0  # a proxy may send a date
                if error.code not in AGAIN or time.monotonic() + seconds > until:
                    raise _refused(error) from error
            except (URLError, HTTPException, OSError) as error:
                hint = "look whether the daemon runs there, then try again"
                raise Transient(f"{self.url} cannot be reached: {error}", hint) from error
            time.sleep(seconds)


def _text(value: Any) -> Any:
    """A value in the form that the daemon parses."""
    if isinstance(value, datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return aware.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, bool):
        return str(value).lower()
    return value


def _refused(error: HTTPError) -> AppError:
    """The daemon's error response, with its hint."""
    try:
        said = json.loads(error.read())["error"]
        message, hint = str(said["message"]), str(said["hint"])
    except (ValueError, KeyError, TypeError):
        message, hint = "the answer is not one of Headwater", "check the address"
    text = f"{error.code} {error.url}: {message}"
    if error.code in AGAIN:
        return Transient(text, hint)
    return Rejected(text, hint) if 400 <= error.code < 500 else Permanent(text, hint)  # noqa: PLR2004
