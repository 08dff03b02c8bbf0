"""HTTP to an InfluxDB server, over one pool of connections for all threads; both query languages ask through it.

urllib3 alone: of the vendor's library only the connection and the token would be used here, and importing it costs more
than every other part of this pipeline (docs/decisions/telemetry.md). Invariants: a body is complete or an error;
urllib3's exceptions become ours here and nowhere else; redirects are not followed, so a token goes to the configured
host only.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any

from app.core.errors import AppError, Permanent, Transient
from app.influx_to_s3.reader import Refusal, refusal

CHUNK_BYTES = 1 << 18
REFUSAL_BYTES = 1 << 16
CONNECT_SECONDS = 5.0
OK = 200


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask. `url` without credentials; `token` wins over `username` and `password`; all empty = none sent."""

    url: str
    token: str = field(default="", repr=False)
    username: str = ""
    password: str = field(default="", repr=False)
    timeout_seconds: float = 120.0
    connections: int = 8


@dataclass(frozen=True, slots=True)
class Answer:
    """A body in pieces of at most CHUNK_BYTES. `framed`: HTTP itself tells its end, by chunks or by a length.

    `version` of the server, "" where it does not say; `told_at`: its own clock, None where it does not tell.
    """

    chunks: Iterator[bytes]
    framed: bool
    version: str = ""
    told_at: datetime | None = None


class Connection:
    """Asks one server. Connects with the first question."""

    def __init__(self, server: Server) -> None:
        self.server = server

    @contextmanager
    def ask(self, path: str, body: bytes | None, headers: Mapping[str, str], where: str) -> Iterator[Answer]:
        """POST the body, or GET where there is none, and stream the answer.

        Its connection goes back to the pool only when the answer was read to its end.

        Raises Transient when the server is away, slow or breaks off, and what `refusal` says of any status but 200;
        `where` names the variables to look at then.
        """
        with self._translated(where):
            response = self._pool.request(
                "GET" if body is None else "POST",
                self.server.url.rstrip("/") + path,
                body=body,
                headers={**self._headers, **headers},
                preload_content=False,
                retries=False,
                timeout=self._timeout,
            )
        with closing(response):
            if response.status != OK:
                raise self._refused(response, where)
            framed = bool(response.headers.get("Transfer-Encoding") or response.headers.get("Content-Length"))
            version = response.headers.get("X-Influxdb-Version", "")
            yield Answer(self._chunks(response, where), framed, version, _instant(response.headers.get("Date", "")))

    def _chunks(self, response: Any, where: str) -> Iterator[bytes]:
        """`read` rather than `stream`, which gives every chunk of the server, often 4 KiB, a round of its own."""
        while True:
            with self._translated(where):
                chunk = response.read(CHUNK_BYTES, decode_content=True)
            if not chunk:
                return
            yield chunk

    def _refused(self, response: Any, where: str) -> AppError:
        with self._translated(where):
            body = response.read(REFUSAL_BYTES, decode_content=True).decode("utf-8", "replace")
        retry_after = response.headers.get("Retry-After", "")
        return refusal(Refusal(self.server.url, response.status, _message(body), retry_after, where))

    @contextmanager
    def _translated(self, where: str) -> Iterator[None]:
        import urllib3.exceptions

        url = self.server.url
        try:
            yield
        except urllib3.exceptions.LocationParseError as error:
            raise Permanent(f"INFLUXDB_URL={url!r} is not a valid URL", "correct INFLUXDB_URL") from error
        except urllib3.exceptions.SSLError as error:
            raise refusal(Refusal(url, 0, str(error)[:200], "", where)) from error
        except urllib3.exceptions.ReadTimeoutError as error:
            raise Transient(
                f"InfluxDB at {url} did not answer within {self.server.timeout_seconds:g} s",
                "raise INFLUXDB_TIMEOUT_SECONDS if it stays; it is retried",
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise Transient(
                f"InfluxDB at {url} cannot be reached or broke off: {type(error).__name__}",
                "check INFLUXDB_URL and that the server runs; it is retried",
            ) from error

    @cached_property
    def _pool(self) -> Any:
        import urllib3

        return urllib3.PoolManager(maxsize=self.server.connections)

    @cached_property
    def _timeout(self) -> Any:
        import urllib3

        return urllib3.Timeout(connect=CONNECT_SECONDS, read=self.server.timeout_seconds)

    @cached_property
    def _headers(self) -> Mapping[str, str]:
        """Answers are compressed on their way through the internet; in a plain network that would only cost both ends
        CPU time.
        """
        import urllib3

        headers: dict[str, str] = urllib3.make_headers(accept_encoding="gzip" if self._is_remote else "identity")
        if self.server.token:
            headers["Authorization"] = f"Token {self.server.token}"
        elif self.server.username:
            # In UTF-8, as Go's servers read it; urllib3 would encode latin-1 and fail beyond it.
            credentials = base64.b64encode(f"{self.server.username}:{self.server.password}".encode()).decode()
            headers["Authorization"] = f"Basic {credentials}"
        return headers

    @property
    def _is_remote(self) -> bool:
        return self.server.url.lower().startswith("https://")


def _instant(text: str) -> datetime | None:
    """An HTTP date."""
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _message(body: str) -> str:
    """The server's own words: `error` of 1.x, `message` of 2.x and 3, else what the body begins with."""
    try:
        parsed = json.loads(body)
    except ValueError:
        return body[:200]
    if not isinstance(parsed, dict):
        return body[:200]
    return str(parsed.get("error") or parsed.get("message") or body)[:300]
