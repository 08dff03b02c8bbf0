"""A proxy before a real server that plays what networks and servers do wrong: `with FaultProxy(host, port) as proxy`.

It speaks HTTP/1.1 and streams both ways; each request meets the first rule that fits and has uses left. With `raw=True`
it moves bytes and knows no requests; that serves in front of PostgreSQL. All of it runs in one thread of its own.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Self

LOOPBACK = "127.0.0.1"
PIECE_BYTES = 1 << 16
HEAD_BYTES = 1 << 18
FOREVER = 1 << 30
BROKEN = (OSError, EOFError, asyncio.LimitOverrunError)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the proxy says in the server's place."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a request, from its arrival to its answer; the functions below name the usual ones."""

    name: str
    delay_seconds: float = 0
    black_hole: bool = False
    reset: bool = False
    instead: Answer | None = None
    strip: tuple[str, ...] = ()
    cut_request_bytes: int | None = None
    lose_answer: bool = False
    afterwards: Answer | None = None
    truncate_bytes: int | None = None


def delay(seconds: float) -> Fault:
    """Forward after a while."""
    return Fault("delay", delay_seconds=seconds)


def black_hole() -> Fault:
    """Take the connection and never say anything."""
    return Fault("black hole", black_hole=True)


def reset() -> Fault:
    """Reset the connection; the server never hears of the request."""
    return Fault("reset", reset=True)


def answer(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Fault:
    """Answer in the server's place; the server never hears of the request."""
    return Fault("answer", instead=Answer(status, body, headers or {}))


def strip(*names: str) -> Fault:
    """Forward without these headers."""
    return Fault("strip", strip=tuple(name.lower() for name in names))


def cut_request(after_bytes: int) -> Fault:
    """Forward only so much of the body, then break both connections."""
    return Fault("cut request", cut_request_bytes=after_bytes)


def lose_answer() -> Fault:
    """The server does it, and the client never learns."""
    return Fault("lose answer", lose_answer=True)


def answer_afterwards(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Fault:
    """The server does it, and the client is told something else."""
    return Fault("answer afterwards", afterwards=Answer(status, body, headers or {}))


def truncate(after_bytes: int) -> Fault:
    """The answer's body ends early; its head promised more."""
    return Fault("truncate", truncate_bytes=after_bytes)


@dataclass(frozen=True, slots=True)
class Request:
    """A request's head. Header names are lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    lines: tuple[str, ...]

    @property
    def expects_continue(self) -> bool:
        return self.headers.get("expect", "").lower() == "100-continue"


@dataclass(slots=True)
class Seen:
    """One request as it went by. `status` is the server's, None when there was none; `fault` names what was played."""

    method: str
    path: str
    headers: Mapping[str, str]
    fault: str = ""
    status: int | None = None


@dataclass(slots=True)
class _Rule:
    fault: Fault
    fits: Callable[[Request], bool]
    times_left: int


class FaultProxy:
    """Listens on `port` of the loopback address while the context is open. Methods may be called from any thread."""

    def __init__(self, host: str, port: int, *, raw: bool = False) -> None:
        self._target = (host, port)
        self._serve = self._serve_raw if raw else self._serve_http
        self._rules: list[_Rule] = []
        self._limits: list[int] = []
        self._needles: list[bytes] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy")
        self.host = LOOPBACK
        self.port = 0
        self.seen: list[Seen] = []

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def add(
        self,
        fault: Fault,
        method: str = "*",
        path: str = "*",
        *,
        times: int = 1,
        fits: Callable[[Request], bool] = lambda _request: True,
    ) -> None:
        """Play `fault` on the next `times` requests whose method and path with query fit the patterns and `fits`."""

        def matches(request: Request) -> bool:
            return fnmatchcase(request.method, method) and fnmatchcase(request.path, path) and fits(request)

        self._rules.append(_Rule(fault, matches, times))

    def clear(self) -> None:
        """Drop all rules."""
        self._rules.clear()
        self._limits.clear()
        self._needles.clear()

    def refuse(self) -> None:
        """Play an outage: nobody listens, and every connection breaks."""
        self._call(self._close_listener)

    def allow(self) -> None:
        """End the outage, on the same port."""
        self._call(self._open_listener)

    def cut(self) -> None:
        """Break every connection that is open now."""
        self._call(self._cancel_connections)

    def drop_after(self, count_bytes: int, times: int = 1) -> None:
        """Raw mode: break each of the next `times` new connections after so many bytes from the server."""
        self._limits.extend([count_bytes] * times)

    def lose_answer_to(self, needle: bytes) -> None:
        """Raw mode: once, forward the piece that holds `needle` (b"COMMIT", say) and break instead of answering it."""
        self._needles.append(needle)

    def _call(self, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        asyncio.run_coroutine_threadsafe(act(), self._loop).result(10)

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        await self._open_listener()
        self._ready.set()
        await self._stop.wait()
        await self._close_listener()

    async def _open_listener(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, self.host, self.port, limit=HEAD_BYTES)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _close_listener(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        await self._cancel_connections()

    async def _cancel_connections(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def finished(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            writer.close()  # a task that was cancelled before its first step did not

        task = self._loop.create_task(self._connection(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(finished)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(*BROKEN):
                await self._serve(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        finally:
            await _close(writer)

    async def _serve_http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (request := await _read_request(reader)) is not None:
            rule = next((rule for rule in self._rules if rule.times_left and rule.fits(request)), None)
            seen = Seen(request.method, request.path, request.headers)
            self.seen.append(seen)
            fault = Fault("")
            if rule is not None:
                rule.times_left -= 1
                fault = rule.fault
                seen.fault = fault.name
            if not await self._play(_Exchange(request, fault, seen, (reader, writer))):
                return

    async def _play(self, exchange: "_Exchange") -> bool:
        """Carry one request through; False when the client's connection must not be used any more."""
        fault, (reader, writer) = exchange.fault, exchange.client
        await asyncio.sleep(fault.delay_seconds)
        if fault.black_hole:
            await reader.read()
            return False
        if fault.reset:
            writer.transport.abort()
            return False
        if fault.instead is not None:
            return await exchange.answer_instead(fault.instead)
        server = await asyncio.open_connection(*self._target, limit=HEAD_BYTES)
        try:
            return await exchange.forward(server)
        finally:
            await _close(server[1])

    async def _serve_raw(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        limit_bytes = self._limits.pop(0) if self._limits else FOREVER
        server = await asyncio.open_connection(*self._target)
        muted = asyncio.Event()
        pumps = [
            self._loop.create_task(self._pump_up(reader, server[1], muted)),
            self._loop.create_task(_pump_down(server[0], writer, muted, limit_bytes)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            server[1].close()  # before anything is awaited: a second cancellation may come there
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            await _close(server[1])

    async def _pump_up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, muted: asyncio.Event) -> None:
        while piece := await reader.read(PIECE_BYTES):
            for needle in [needle for needle in self._needles if needle in piece]:
                self._needles.remove(needle)
                muted.set()
            await _send(writer, piece)


async def _pump_down(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, muted: asyncio.Event, limit_bytes: int
) -> None:
    left_bytes = limit_bytes
    while left_bytes and (piece := await reader.read(min(PIECE_BYTES, left_bytes))):
        if muted.is_set():
            writer.transport.abort()
            return
        left_bytes -= len(piece)
        await _send(writer, piece)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """One request on its way. The methods return False when the client's connection is used up."""

    request: Request
    fault: Fault
    seen: Seen
    client: Streams

    async def answer_instead(self, said: Answer) -> bool:
        """A client that waits for 100 has sent no body; any other is heard out, or a reset would take the answer."""
        reader, writer = self.client
        if not self.request.expects_continue:
            async for _ in _body(reader, self.request.headers):
                pass
        await self._say(said)
        writer.write_eof()
        return False

    async def forward(self, server: Streams) -> bool:
        reader, writer = self.client
        await _send(server[1], _head([self.request.lines[0], *self._kept_lines()]))
        if self.request.expects_continue:
            await _send(writer, b"HTTP/1.1 100 Continue\r\n\r\n")
        left_bytes = FOREVER if self.fault.cut_request_bytes is None else self.fault.cut_request_bytes
        async for piece in _body(reader, self.request.headers):
            await _send(server[1], piece[:left_bytes])
            left_bytes -= min(left_bytes, len(piece))
            if not left_bytes:
                writer.transport.abort()
                return False
        return await self._hand_back(server[0])

    def _kept_lines(self) -> list[str]:
        gone = {*self.fault.strip, "expect"}
        return [line for line in self.request.lines[1:] if line.partition(":")[0].lower() not in gone]

    async def _hand_back(self, server: asyncio.StreamReader) -> bool:
        _, writer = self.client
        lines, headers = await _read_head(server)
        self.seen.status = int(lines[0].split(" ", 2)[1])
        bodiless = self.request.method == "HEAD" or self.seen.status in (204, 304)
        pieces = _body(server, {"content-length": "0"} if bodiless else headers, to_the_end=True)
        if self.fault.lose_answer or self.fault.afterwards is not None:
            async for _ in pieces:
                pass
            if self.fault.afterwards is None:
                writer.transport.abort()
                return False
            await self._say(self.fault.afterwards)
            return False
        await _send(writer, _head(lines))
        left_bytes = FOREVER if self.fault.truncate_bytes is None else self.fault.truncate_bytes
        async for piece in pieces:
            await _send(writer, piece[:left_bytes])
            left_bytes -= min(left_bytes, len(piece))
            if not left_bytes:
                return False
        framed = bodiless or "content-length" in headers or "transfer-encoding" in headers
        return framed and headers.get("connection", "").lower() != "close"

    async def _say(self, said: Answer) -> None:
        headers = {"Content-Length": str(len(said.body)), "Connection": "close", **said.headers}
        lines = [f"HTTP/1.1 {said.status} Fault", *(f"{name}: {value}" for name, value in headers.items())]
        await _send(self.client[1], _head(lines) + (b"" if self.request.method == "HEAD" else said.body))


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next head; None when the client is done."""
    try:
        lines, headers = await _read_head(reader)
    except asyncio.IncompleteReadError:
        return None
    method, path, _ = lines[0].split(" ", 2)
    return Request(method, path, headers, tuple(lines))


async def _read_head(reader: asyncio.StreamReader) -> tuple[list[str], dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lines = head.removesuffix("\r\n\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:])
    return lines, {name.lower(): value.strip() for name, _, value in pairs}


def _head(lines: list[str]) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def _body(
    reader: asyncio.StreamReader, headers: Mapping[str, str], *, to_the_end: bool = False
) -> AsyncIterator[bytes]:
    """The bytes as they travel, chunk framing included. `to_the_end`: without a length they end with the line."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        size = -1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line
            async for piece in _exactly(reader, size):
                yield piece
            yield await reader.readexactly(2)
    elif "content-length" in headers or not to_the_end:
        async for piece in _exactly(reader, int(headers.get("content-length", 0))):
            yield piece
    else:
        while piece := await reader.read(PIECE_BYTES):
            yield piece


async def _exactly(reader: asyncio.StreamReader, count_bytes: int) -> AsyncIterator[bytes]:
    left_bytes = count_bytes
    while left_bytes:
        piece = await reader.read(min(left_bytes, PIECE_BYTES))
        if not piece:
            raise EOFError
        left_bytes -= len(piece)
        yield piece


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
