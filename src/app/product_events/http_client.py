"""GET requests to the one configured address of an external service. No other module uses httpx.

Invariants: no httpx exception leaves this module; redirects are never followed, so only the configured address is
called; no message contains a credential; a truncated body is an error, not the end of the data. Every wait has an end:
READ_SECONDS for the next byte, WHOLE_SECONDS for the whole answer, however slowly its bytes trickle in, and a requested
stop for both.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from app.core.errors import Permanent, Stopped, Transient
from app.core.files import temporary_file
from app.core.network import CA_HINT, SharedClient, connection_fault, is_untrusted
from app.core.retry import Pauses, asked_seconds
from app.core.windows import DAY_SECONDS

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS, READ_SECONDS = 10.0, 300.0  # services build archives before the first byte
WHOLE_SECONDS = 3 * 3600.0  # 4 GB at 370 kB/s
LOOK_SECONDS = 0.5
TEXT_BYTES = 2000


class ServiceAnswer:
    """Status and headers of a response, and its body as a stream. Valid inside the `Upstream.get` block.

    Reading raises Transient when the body takes more than `whole_seconds` from now.
    """

    def __init__(self, response: "httpx.Response", whole_seconds: float) -> None:
        self._response = response
        self._whole_seconds, self._until = whole_seconds, time.monotonic() + whole_seconds
        self.status: int = response.status_code

    def header(self, name: str) -> str:
        """A header's value; "" when it is missing."""
        return str(self._response.headers.get(name, ""))

    def raw(self) -> Iterator[bytes]:
        """The body in chunks as they arrive: still compressed if `content-encoding` says so."""
        return self._in_time(self._response.iter_raw())  # a chunk size would hold bytes back until it is reached

    def text(self) -> str:
        """The start of the body as one printable line, for messages."""
        found = bytearray()
        for piece in self._in_time(self._response.iter_bytes()):
            found += piece
            if len(found) >= TEXT_BYTES:
                break
        text = found[:TEXT_BYTES].decode("utf-8", "replace")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())

    @property
    def retry_after_seconds(self) -> float | None:
        """How long the service asks us to wait, at most a day; None when it does not say."""
        seconds = asked_seconds(self.header("retry-after"))
        return None if seconds is None else min(seconds, DAY_SECONDS)

    def _in_time(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            if time.monotonic() > self._until:
                said = f"the answer did not arrive within {self._whole_seconds:g} seconds"
                raise Transient(said, "no action needed if this is temporary; otherwise check the network")
            yield piece


@contextmanager
def held_turn(turn: threading.Lock, pauses: Pauses) -> Iterator[None]:
    """Hold `turn` for the block. A requested stop also ends the wait for it, which may last as long as the answer that
    another thread is reading.
    """
    while not turn.acquire(timeout=LOOK_SECONDS):
        pauses.pause(0)
    try:
        yield
    finally:
        turn.release()


def disk_fault(spool: Path, error: OSError, size: str = "temporary files") -> Transient:
    """The error of a disk that refuses a temporary file of `size`, in words."""
    return Transient(f"{spool}: {error}", f"free space on this disk for {size}")


@contextmanager
def spooled(spool: Path, size: str) -> Iterator[BinaryIO]:
    """A temporary file for data of `size`, in words; closed when the block raises. Raises Transient when the disk
    refuses it.
    """
    try:
        with ExitStack() as undo:
            file = undo.enter_context(temporary_file(spool))
            yield file
            undo.pop_all()
    except OSError as error:
        raise disk_fault(spool, error, size) from error


class Upstream:
    """One service. `variable` is the setting that holds its `base_url`, used in hints; `headers` hold the credential.

    Connects on first use. Thread-safe. `answered_at` is the service's own clock at its last answer that told it.
    """

    def __init__(
        self,
        service: str,
        base_url: str,
        variable: str,
        headers: Mapping[str, str],
        whole_seconds: float = WHOLE_SECONDS,
    ) -> None:
        self._service, self._base_url, self._variable, self._headers = service, base_url, variable, headers
        self._whole_seconds = whole_seconds
        self.answered_at: datetime | None = None
        self._client = SharedClient(self._make)

    def close(self) -> None:
        """Close idle connections. The client can be used again afterwards."""
        self._client.close()

    @contextmanager
    def get(
        self, path: str, headers: Mapping[str, str], pauses: Pauses, read_seconds: float = READ_SECONDS
    ) -> Iterator[ServiceAnswer]:
        """Request `path`, query included. Returns any status; raises Transient for a missing or truncated response, and
        Stopped when a stop is requested.
        """
        import httpx

        client: httpx.Client = self._client()
        timeout = httpx.Timeout(read_seconds, connect=CONNECT_SECONDS)
        try:
            with (
                _cut_by(pauses) as trace,
                client.stream(
                    "GET", self._base_url + path, headers=dict(headers), timeout=timeout, extensions={"trace": trace}
                ) as response,
            ):
                self.answered_at = _instant(response.headers.get("date", "")) or self.answered_at
                yield ServiceAnswer(response, self._whole_seconds)
        except httpx.HTTPError as error:
            pauses.pause(0)  # raises Stopped if that is why
            said = str(error) or type(error).__name__
            if is_untrusted(error):
                raise Permanent(f"{self._service} at {self._base_url}: {said}", CA_HINT) from error
            hint = f"no action needed if this is temporary; otherwise check {self._variable} and the network"
            fault = connection_fault(error, self._base_url) or said
            raise Transient(f"{self._service}: {fault}", hint) from error

    def _make(self) -> "httpx.Client":
        import httpx

        # One line per request would flood the log; one per run is enough.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        # A connection for each request: `_cut_by` is told of new ones only.
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(headers=dict(self._headers), limits=limits, follow_redirects=False)


@contextmanager
def _cut_by(pauses: Pauses) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
    """Cut the connection of a request as soon as a stop is requested, since the thread that reads it may be blocked for
    minutes. Yields what httpcore calls for each of its steps; see its `trace` extension.
    """
    streams, done = list[Any](), threading.Event()

    def trace(step: str, found: Mapping[str, Any]) -> None:
        if step.endswith((".connect_tcp.complete", ".start_tls.complete")):
            streams.append(found["return_value"])

    def watch() -> None:
        while not done.wait(LOOK_SECONDS):
            try:
                pauses.pause(0)
            except Stopped:
                for stream in streams[-1:]:
                    with suppress(OSError):
                        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    watching = threading.Thread(target=watch, name="request-stop", daemon=True)
    watching.start()
    try:
        yield trace
    finally:
        done.set()
        watching.join()


def _instant(date: str) -> datetime | None:
    """The instant of a Date header; None when it is missing or invalid."""
    try:
        at = parsedate_to_datetime(date)
    except ValueError:
        return None
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at
