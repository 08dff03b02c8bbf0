"""Reports over a tree of exported objects, and its table of closed days, as the daemon builds them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa

from app.analytics import service
from app.analytics.formats import AnswerShape
from app.analytics.service import Analytics
from app.db.state import open_state
from app.lake.reader import TableReader
from lake_tree import DAY, NOW, Tree, rows

REPORTS: dict[str, dict[str, str]] = {
    "overview": {},
    "daily-summary": {},
    "rows-by-day": {},
    "devices": {},
    "devices/latest": {},
    "over-time": {"minutes": "7"},
    "rows": {"device_id": "b"},
}
SPANS: list[dict[str, str]] = [
    {},
    {"to": "2026-02-08"},
    {"from": "2026-02-07T00:20:00Z", "to": "2026-02-08T01:10:00Z"},
    {"device_id": "ü #?%", "from": "2026-02-06T23:00:00Z"},
]
VOLTAGES = pa.array([230.25, 231.5, 229.75, 230.0])  # sums are exact in any order


def odd(count: int = 4, **columns: Any) -> dict[str, Any]:
    """Columns with what reports must understand alike."""
    return {
        "temperature": pa.array([float("nan"), None, 40.5, float("inf")][:count]),
        "soc": pa.array([80, 90, None, 70][:count], pa.int64()),
        "power": pa.array([0.25 * each for each in range(count)]),
        "voltage": VOLTAGES[:count],
        **columns,
    }


def filled(tree: Tree) -> Tree:
    """Two closed days and one that is open, with late fields, other types, nanoseconds, and equal instants."""
    for device in ("a", "b", "ü #?%"):
        for hour in range(3):
            for day in (DAY, NOW.date()):
                tree.put(device, hour, rows(device, hour, day=day, **odd() if hour else {"voltage": VOLTAGES}), day=day)
    start_ns = round(datetime(2026, 2, 7, 9, tzinfo=UTC).timestamp()) * 10**9
    instants = pa.array([start_ns + number for number in (7, 7, 1001, 1999)], pa.timestamp("ns", "UTC"))
    tree.put("a", 9, rows("a", 9, timestamp=instants, phase=pa.array(["x", "y", "x", "y"]), **odd()))
    tree.put(
        "a", 5, rows("a", 5, day=date(2026, 2, 6), voltage=pa.array([1, 2, 3, 4], pa.int64())), day=date(2026, 2, 6)
    )
    return tree


class Asked:
    """The reports of a tree, as the daemon builds them."""

    def __init__(self, tree: Tree, analytics: Analytics) -> None:
        self.tree = tree
        self.analytics = analytics
        self.engine = ""

    def rows(self, path: str, as_of: datetime | None = None, /, **given: str) -> Any:
        """The rows of an answer, without what is null."""
        report = self.analytics.reports[path]
        values = report.values([*given.items()])
        answer = self.analytics.queries.run(report, values, AnswerShape("json", report.answer), as_of)
        self.engine = answer.engine
        said = json.loads(b"".join(answer.pieces()))
        assert "warnings" not in said
        found = said[report.answer] if report.answer != "object" else [said]
        return [{name: value for name, value in row.items() if value is not None} for row in found]

    def everything(self, spans: Sequence[dict[str, str]] = SPANS[:1]) -> dict[str, Any]:
        return {f"{path} {span}": self.rows(path, **{**span, **own}) for path, own in REPORTS.items() for span in spans}


@contextmanager
def reports(
    tree: Tree,
    keys: tuple[str, str, str] = ("", "", ""),
    *,
    with_table: bool = True,
    reader: type[TableReader] = TableReader,
) -> Iterator[Asked]:
    (tree.folder / "state").mkdir(exist_ok=True)
    state = open_state("", tree.folder / "state")
    table = reader(tree.settings, tree.store, lambda: datetime.now(UTC)) if with_table else None
    analytics = service.build(tree.settings, tree.store, state.summaries, lambda: keys, lambda: tree.now, table=table)
    with closing(state):
        analytics.workplace.enter()
        analytics.summaries.refresh()
        yield Asked(tree, analytics)
        analytics.queries.close()
        analytics.workplace.leave()


def only_objects(tree: Tree, spans: Sequence[dict[str, str]] = SPANS[:1]) -> dict[str, Any]:
    with reports(tree, with_table=False) as asked:
        return asked.everything(spans)
