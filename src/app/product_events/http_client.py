"""GET requests to the one configured address of an outside service. httpx has its home here.

Invariants: no exception of httpx leaves this module; a redirect is never followed, so what is configured is what is
called; no message holds a credential; a body that ends early is an error, not an end.
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
    """The head of an answer, and its body as it comes. Valid inside the block of `Upstream.get`."""

    def __init__(self, response: "httpx.Response") -> None:
        self._response = response
        self.status: int = response.status_code

    def header(self, name: str) -> str:
        """A header's value; "" when there is none."""
        return str(self._response.headers.get(name, ""))

    def raw(self) -> Iterator[bytes]:
        """The body in pieces, as it was sent: still compressed when `content-encoding` says so."""
        return self._response.iter_raw(PIECE_BYTES)

    def text(self) -> str:
        """The beginning of the body as one printable line, for messages."""
        found = bytearray()
        for piece in self._response.iter_bytes():
            found += piece
            if len(found) >= TEXT_BYTES:
                break
        text = found[:TEXT_BYTES].decode("utf-8", "replace")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())

    @property
    def retry_after_seconds(self) -> float | None:
        """How long the service asks to wait; None when it does not say."""
        return asked_seconds(self.header("retry-after"))


@contextmanager
def body_file(spool: Path, size: str) -> Iterator[BinaryIO]:
    """A temporary file for a body of `size`, in words; its holder closes it after the block.

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
    """One service: `variable` is the setting that holds its `base_url`, for hints; `headers` hold the credential.

    Connects on first use; safe to use from many threads.
    """

    def __init__(self, service: str, base_url: str, variable: str, headers: Mapping[str, str]) -> None:
        self._service, self._base_url, self._variable, self._headers = service, base_url, variable, headers
        self._client = SharedClient(self._make)

    def close(self) -> None:
        """Close idle connections. It may be used again afterwards."""
        self._client.close()

    @contextmanager
    def get(self, path: str, headers: Mapping[str, str]) -> Iterator[ServiceAnswer]:
        """Ask for `path`, its query included. Any status is an answer; Transient for none or a part."""
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

        # Its line for each request would drown the log, where a run has one.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        return httpx.Client(headers=dict(self._headers), timeout=timeout, follow_redirects=False)
