"""The gap maps of all pipelines, made from listings of the destinations and kept for some seconds.

Invariants: one request for a map at a time reaches a destination, however many people look; what is kept is bounded;
a partition that cannot be listed shows its error and hides no other.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from app.core.errors import AppError, Rejected, Transient
from app.core.verify import Cell, Chart
from app.core.windows import Window

KEPT_SECONDS = 20.0
KEPT_MAPS = 64
WAIT_SECONDS = 20.0
AT_ONCE = 8
CELLS = 200


@dataclass(frozen=True, slots=True)
class Line:
    """One partition of a map: its newest cells, oldest first. `error` is empty when it could be listed."""

    partition: str
    cells: Sequence[Cell]
    error: str = ""


@dataclass(frozen=True, slots=True)
class GapMap:
    """The lines of some partitions, and how many partitions there are."""

    total: int
    lines: Sequence[Line]


@dataclass(frozen=True, slots=True)
class MapRequest:
    """Which map: `limit` partitions of a job from `offset` on, by name."""

    job: str
    span: Window
    offset: int
    limit: int


class Atlas:
    """Maps by request. From any thread."""

    def __init__(self, charts: Mapping[str, Chart]) -> None:
        self._charts = charts
        self._turn = threading.Lock()
        self._kept: OrderedDict[MapRequest, tuple[GapMap, float]] = OrderedDict()

    @property
    def jobs(self) -> Sequence[str]:
        """Jobs that have a map."""
        return sorted(self._charts)

    def forget(self, job: str) -> None:
        """List the destination of `job` anew next time: something was mended."""
        for asked in [each for each in list(self._kept) if each.job == job]:
            self._kept.pop(asked, None)

    def gaps(self, asked: MapRequest) -> GapMap:
        """The map. Raises Rejected for a job without one, Transient when the destination keeps others waiting."""
        chart = self._charts.get(asked.job)
        if chart is None:
            raise Rejected(f"job {asked.job[:80]!r} has no gap map", f"jobs that have one: {', '.join(self.jobs)}")
        if not self._turn.acquire(timeout=WAIT_SECONDS):
            raise Transient(f"{asked.job}: its destination is slow to list", "look at /ready, and ask again")
        try:
            known, at = self._kept.get(asked, (None, 0.0))
            if known is None or time.monotonic() - at > KEPT_SECONDS:
                known = _drawn(chart, asked)
                self._kept[asked] = (known, time.monotonic())
            while len(self._kept) > KEPT_MAPS:
                self._kept.popitem(last=False)
            return known
        finally:
            self._turn.release()


def _drawn(chart: Chart, asked: MapRequest) -> GapMap:
    partitions = chart.partitions()

    def line(partition: str) -> Line:
        try:
            return Line(partition, chart.cells(partition, asked.span)[-CELLS:])
        except AppError as error:
            return Line(partition, (), str(error))

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="atlas") as pool:
        lines = list(pool.map(line, partitions[asked.offset : asked.offset + asked.limit]))
    return GapMap(len(partitions), lines)
