"""AppMetrica's Logs API: one request in, one of four answers out, as contracts describe `/logs/v1/export`.

Invariants: a call is counted before it is made, and none is made beyond the day's; one request at a time is under way;
what the service says is never taken for a file, and a file that ends early never for a whole one.
"""

import json
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from app.core.errors import Permanent, Transient
from app.product_events.http_client import Address, ServiceAnswer, Upstream, receiving

SERVICE = "appmetrica"
PROGRESS = re.compile(r"Progress is (\d+)%")
QUEUED = re.compile(r"enqueued", re.IGNORECASE)
MORE_PARTS = re.compile(r"more parts", re.IGNORECASE)
BUSY = (420, HTTPStatus.TOO_MANY_REQUESTS)  # the English page of quotas says the one, the Russian page the other
QUEUE_SECONDS, RATE_SECONDS = 60.0, 5.0
GZIP_BITS = 31
MAX_LIST_BYTES = 1 << 20
APPLICATIONS = "/management/v1/applications"
ACCESS_HINT = "check APPMETRICA_API_KEY: an OAuth token with appmetrica:read, and APPMETRICA_APPLICATION_ID"


@dataclass(frozen=True, slots=True)
class NotReady:
    """The file is not there yet. `percent` None = it was not said; `at_least_seconds`: to wait before asking again.

    `heard`: the service has accepted the request.
    """

    text: str
    percent: int | None = None
    at_least_seconds: float = 0.0
    heard: bool = True


class RequestRefused(Permanent):
    """The request itself is wrong, as the service says in `text`."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(
            f"AppMetrica answers {status}: {text}", "correct the request: a column or a date that it does not know"
        )
        self.text = text


class MoreParts(Exception):
    """The file is too large for so many parts."""


@dataclass(frozen=True, slots=True)
class Service:
    """AppMetrica for one application. `count_call` raises Transient when the day's calls are used."""

    upstream: Upstream
    application_id: int
    spool: Path
    count_call: Callable[[], None]
    turn: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, path: str, *, fresh: bool) -> NotReady | BinaryIO:
        """The file of a request, as gzip, or that it is not there yet. Whoever takes the file closes it.

        `fresh`: not one that was made before; that puts the request at the end of the queue, so it is said only once.
        Raises MoreParts, Refused, Transient and Permanent.
        """
        headers = {"Accept-Encoding": "gzip", **({"Cache-Control": "no-cache"} if fresh else {})}
        with self.turn:
            self.count_call()
            with self.upstream.get(path, headers) as answer:
                if answer.status == HTTPStatus.OK:
                    return self._received(answer)
                return _said(answer)

    def applications(self) -> Mapping[int, Mapping[str, Any]]:
        """The applications that the token may see, by id. Raises Transient and Permanent."""
        with self.turn:
            self.count_call()
            with self.upstream.get(APPLICATIONS, {"Accept-Encoding": "identity"}) as answer:
                if answer.status != HTTPStatus.OK:
                    raise _error(answer, answer.text())
                return _listed(answer)

    def _received(self, answer: ServiceAnswer) -> BinaryIO:
        with receiving(self.spool, "a file of many rows") as file:
            packed = answer.header("content-encoding").lower() == "gzip"
            measured = bool(answer.header("content-length") or answer.header("transfer-encoding"))
            pieces = answer.raw()
            file.writelines(_checked(pieces, empty=measured) if packed else _packed(pieces))
            file.seek(0)
        return file


def service(base_url: str, token: str, application_id: int, spool: Path, count_call: Callable[[], None]) -> Service:
    """AppMetrica with a token."""
    headers = {"Authorization": f"OAuth {token}"}
    return Service(
        Upstream(Address("AppMetrica", base_url, "APPMETRICA_BASE_URL", headers)), application_id, spool, count_call
    )


def _said(answer: ServiceAnswer) -> NotReady:
    """What an answer without a file means."""
    text = answer.text()
    match answer.status:
        case HTTPStatus.ACCEPTED:
            found = PROGRESS.search(text)
            return NotReady(text, int(found[1]) if found else None)
        case HTTPStatus.BAD_REQUEST if MORE_PARTS.search(text):
            raise MoreParts
        case HTTPStatus.BAD_REQUEST | HTTPStatus.NOT_FOUND:
            raise RequestRefused(text, answer.status)
        case status if status in BUSY:
            seconds = QUEUE_SECONDS if QUEUED.search(text) else RATE_SECONDS
            return NotReady(text, None, answer.retry_after_seconds or seconds, heard=False)
    raise _error(answer, text)


def _error(answer: ServiceAnswer, text: str) -> Exception:
    said = f"AppMetrica answers {answer.status}: {text or 'nothing'}"
    if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return Permanent(said, ACCESS_HINT)
    if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR or answer.status in BUSY:
        return Transient(said, "no action needed if it passes; the file that is being made is kept")
    return Permanent(said, "check APPMETRICA_BASE_URL")


def _listed(answer: ServiceAnswer) -> Mapping[int, Mapping[str, Any]]:
    body = bytearray()
    for piece in answer.raw():
        body += piece
        if len(body) > MAX_LIST_BYTES:
            raise Permanent("the list of applications is too long", "use a token that sees fewer of them")
    try:
        return {int(each["id"]): each for each in json.loads(body)["applications"]}
    except (ValueError, KeyError, TypeError) as error:
        raise Permanent("the list of applications cannot be read", "check APPMETRICA_BASE_URL") from error


def _checked(pieces: Iterator[bytes], *, empty: bool) -> Iterator[bytes]:
    """The pieces, which are gzip. Raises Transient unless they are whole. `empty`: no piece at all is whole, too."""
    first = next(pieces, b"")
    if not first and empty:
        yield from _packed(iter(()))
        return
    inflater = zlib.decompressobj(GZIP_BITS)
    try:
        for piece in chain([first], pieces):
            rest = piece
            while rest and not inflater.eof:
                inflater.decompress(rest, 1 << 20)
                rest = inflater.unconsumed_tail
            yield piece
    except zlib.error as error:
        raise Transient(
            f"the file of AppMetrica is broken: {error}", "no action needed: it is fetched again"
        ) from error
    if not inflater.eof:
        raise Transient("the file of AppMetrica was cut", "no action needed: it is fetched again")


def _packed(pieces: Iterator[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(1, wbits=GZIP_BITS)
    for piece in pieces:
        yield packer.compress(piece)
    yield packer.flush()
