"""An InfluxDB 2 that runs inside this process: written to by line protocol, read by Flux and InfluxQL.

Invariant: it speaks contracts/influxdb.md to the byte over real HTTP on a loopback port, from points that were really
written; what it cannot answer as a server would, it refuses.
"""

import time
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Self

from simulators.faults import Faults
from simulators.flux import Bucket
from simulators.http import Served
from simulators.influx_api import AnsweredQuery, InfluxApi, Surroundings, refused
from simulators.influx_points import SHARD_NS, Points
from simulators.line_protocol import parse_lines

ORG_ID = "0a1b2c3d4e5f6071"
BUCKET_ID = "1f2e3d4c5b6a7080"
REMEMBERED_QUERIES = 10_000


class InfluxSimulator:
    """One organisation with one bucket. Use it as a context manager, or `start` and `close` it.

    `faults`: what the next queries shall suffer. `points`: what is stored. `starting`: set it to answer as a server
    that has not come up yet. `now_ns` is the clock behind `now()` and behind points written without a time. `shard_ns`
    is the duration of a shard group, inside which a field has one type.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        token: str = "demo-token",  # noqa: S107 - a simulator on loopback
        org: str = "demo",
        bucket: str = "telemetry",
        now_ns: Callable[[], int] = time.time_ns,
        shard_ns: int = SHARD_NS,
    ) -> None:
        self.token = token
        self.org = org
        self.bucket = bucket
        self.points = Points(shard_ns)
        self.faults = Faults()
        self.starting = False
        self._now_ns = now_ns
        self._queries: deque[AnsweredQuery] = deque(maxlen=REMEMBERED_QUERIES)
        self._lock = Lock()
        too_large = refused(413, "unable to read data: points batch is too large")
        self._served = Served("influx", port, too_large=too_large)

    def start(self) -> Self:
        """Listen and serve from a thread; a closed simulator may be started again with its points, on the same port."""
        around = Surroundings(
            self.token,
            self.org,
            self._now_ns,
            self.faults,
            self._record,
            self._served.wait,
            lambda: self.starting,
        )
        self._served.start(InfluxApi(Bucket(self.bucket, self.points, BUCKET_ID, ORG_ID), around).respond)
        return self

    def close(self) -> None:
        """Stop listening and end every connection; nothing when it does not run."""
        self._served.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where it listens, without a trailing slash."""
        return self._served.url

    def write(self, lines: str, precision: str = "ns") -> None:
        """Store line protocol without HTTP. Raises BadLine, and ValueError when a point was dropped."""
        dropped = self.points.write(parse_lines(lines, self._now_ns(), precision))
        if dropped:
            raise ValueError(f"{len(dropped)} points dropped: {dropped[0]}")

    @property
    def queries(self) -> tuple[AnsweredQuery, ...]:
        """Every query that was answered, oldest first; the last 10,000 are kept."""
        with self._lock:
            return tuple(self._queries)

    @property
    def rows_sent(self) -> int:
        """Rows over all queries on record."""
        return sum(query.rows for query in self.queries)

    def forget_queries(self) -> None:
        """Begin a new record."""
        with self._lock:
            self._queries.clear()

    def _record(self, query: AnsweredQuery) -> None:
        with self._lock:
            self._queries.append(query)
