"""Keeps a database supplied with what the devices send: some past hours at start, then live points, late ones included.

Invariant: every sample that arrives between the oldest instant and now is written, in order of arrival; after a
failure it is written again, onto the same point. Which ones, and with which values, depends on seed and times only.
"""

import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Self

from simulators.devices import Device, arrivals
from simulators.instants import NS
from simulators.repeating import Repeating

BATCH_LINES = 5000
WRITE_SECONDS = 30
HOUR_NS = 3600 * NS
Write = Callable[[str], None]
log = logging.getLogger(__name__)


def http_writer(url: str, *, token: str, org: str, bucket: str) -> Write:
    """Writes line protocol over /api/v2/write. The writer raises OSError when the server refuses or is away."""
    parameters = urllib.parse.urlencode({"org": org, "bucket": bucket, "precision": "ns"})
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"not an HTTP address: {url!r}")

    def write(lines: str) -> None:
        headers = {"Authorization": f"Token {token}", "Content-Type": "text/plain; charset=utf-8"}
        request = urllib.request.Request(f"{url}/api/v2/write?{parameters}", lines.encode(), headers)  # noqa: S310 - http
        with urllib.request.urlopen(request, timeout=WRITE_SECONDS) as answer:  # noqa: S310 - checked above
            answer.read()

    return write


class Feeder:
    """Writes the samples of `devices` until it is closed.

    `start` returns when all since `oldest_ns` is written; live points follow from a thread, every `interval_seconds`. A
    write that fails is tried again with the next ones; `written` counts lines.
    """

    def __init__(
        self,
        write: Write,
        devices: Sequence[Device],
        *,
        oldest_ns: int,
        interval_seconds: float = 2.0,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.written = 0
        self._write = write
        self._devices = tuple(devices)
        self._now_ns = now_ns
        self._oldest_ns = self._done_ns = oldest_ns
        self._live = Repeating("feeder", self._feed_live, interval_seconds)

    def start(self) -> Self:
        """Write the backlog, then begin with the live points."""
        self.feed(self._now_ns())
        self._live.start()
        return self

    def close(self) -> None:
        """Stop; what is being written is finished."""
        self._live.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def feed(self, now_ns: int) -> int:
        """Write what arrived since the last call and return the number of lines. Raises OSError."""
        lines = self._lines(self._done_ns, now_ns)
        count = 0
        while batch := list(islice(lines, BATCH_LINES)):
            self._write("\n".join(batch))
            count += len(batch)
        self._done_ns = now_ns
        self.written += count
        return count

    def _lines(self, start_ns: int, stop_ns: int) -> Iterator[str]:
        series = {device.number: device.series for device in self._devices}
        for at_ns in range(start_ns, stop_ns, HOUR_NS):
            end_ns = min(at_ns + HOUR_NS, stop_ns)
            for device, sample in arrivals(self._devices, at_ns, end_ns, self._oldest_ns):
                yield sample.line(series[device.number])

    def _feed_live(self) -> None:
        try:
            self.feed(self._now_ns())
        except OSError as error:
            log.warning("the demo's feeder could not write, and tries again: %s", error)
