"""GET requests to the one configured address of an external service. No other module uses httpx.

Invariants: no httpx exception leaves this module; redirects are never followed, so only the configured address is
called; no message contains a credential; a truncated body is an error, not the end of the data.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from app.core.errors import Permanent, Transient
from app.core.files import temporary_file
from app.core.network import CA_HINT, SharedClient, connection_fault, is_untrusted
from app.core.retry import asked_seconds

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS, READ_SECONDS = 10.0, 300.0  # services build archives before the first byte
TEXT_BYTES = 2000
PIECE_BYTES = 1 << 18


class ServiceAnswer:
    """Status and headers of a response, and its body as a stream. Valid inside the `Upstream.get` block."""

    def __init__(self, response: "httpx.Response") -> None:
        self._response = response
        self.status: int = response.status_code

    def header(self, name: str) -> str:
        """A header's value; "" when it is missing."""
        return str(self._response.headers.get(name, ""))

    def raw(self) -> Iterator[bytes]:
        """The body in chunks as sent: still compressed if `content-encoding` says so."""
        return self._response.iter_raw(PIECE_BYTES)

    def text(self) -> str:
        """The start of the body as one printable line, for messages."""
        found = bytearray()
        for piece in self._response.iter_bytes():
            found += piece
            if len(found) >= TEXT_BYTES:
                break
        text = found[:TEXT_BYTES].decode("utf-8", "replace")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())

    @property
    def retry_after_seconds(self) -> float | None:
        """How long the service asks us to wait; None when it does not say."""
        return asked_seconds(self.header("retry-after"))


@contextmanager
def body_file(spool: Path, size: str) -> Iterator[BinaryIO]:
    """A temporary file for a body of `size` (in words); closed after the block.

    Raises Transient when the disk refuses it.
    """
    try:
        spool.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undo:
            file = undo.enter_context(temporary_file(spool))
            yield file
            undo.pop_all()
    except OSError as error:
        raise Transient(f"{spool}: {error}", f"make room on this disk for {size}") from error


class Upstream:
    """One service. `variable` is the setting that holds its `base_url`, used in hints; `headers` hold the credential.

    Connects on first use. Thread-safe.
    """

    def __init__(self, service: str, base_url: str, variable: str, headers: Mapping[str, str]) -> None:
        self._service, self._base_url, self._variable, self._headers = service, base_url, variable, headers
        self._client = SharedClient(self._make)

    def close(self) -> None:
        """Close idle connections. The client can be used again afterwards."""
        self._client.close()

    @contextmanager
    def get(self, path: str, headers: Mapping[str, str]) -> Iterator[ServiceAnswer]:
        """Request `path`, query included. Returns any status; raises Transient for a missing or truncated response."""
        import httpx

        client: httpx.Client = self._client()
        try:
            with client.stream("GET", self._base_url + path, headers=dict(headers)) as response:
                yield ServiceAnswer(response)
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
            if is_untrusted(error):
                raise Permanent(f"{self._service} at {self._base_url}: {said}", CA_HINT) from error
            hint = f"no action needed if it passes; otherwise check {self._variable} and the network"
            fault = connection_fault(error, self._base_url) or said
            raise Transient(f"{self._service}: {fault}", hint) from error

    def _make(self) -> "httpx.Client":
        import httpx

        # One line per request would flood the log; one per run is enough.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        return httpx.Client(headers=dict(self._headers), timeout=timeout, follow_redirects=False)
