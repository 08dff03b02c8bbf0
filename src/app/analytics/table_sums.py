"""Computes an object's `/analytics` facts from its rows while they are written, so that it need not be read back.

Invariant: the facts equal those from reading the object. If that is not certain, there are none, and the object is read
like any other.
"""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from app.analytics.engine import DOCUMENTED, INSTANT, NUMBERS, TEXTS
from app.analytics.reports import LATEST, rank
from app.db.object_summaries import DaySummary, ObjectFacts

if TYPE_CHECKING:
    import pyarrow as pa

DAY_US = 86_400_000_000
TYPES = {
    "string": "VARCHAR",
    "double": "DOUBLE",
    "int64": "BIGINT",
    "int32": "INTEGER",
    "int16": "SMALLINT",
    "uint64": "UBIGINT",
    "bool": "BOOLEAN",
    "timestamp[us, tz=UTC]": "TIMESTAMP WITH TIME ZONE",
}


class TableSums:
    """Facts of one object with one device and day. `schema`: the object's schema; `form`: parquet or csv."""

    def __init__(self, schema: "pa.Schema", form: str) -> None:
        self._is_csv = form == "csv"
        self._columns = _columns(schema, is_csv=self._is_csv)
        self._rows = 0
        self._first_ns: int | None = None
        self._last_ns: int | None = None
        self._numbers: dict[str, list[Any]] = {"voltage": [], "temperature": [], "soc": []}
        self._device: str | None = None
        self._latest: tuple[Any, ...] | None = None

    def add(self, table: "pa.Table") -> None:
        """Add rows as they are written, sorted by their timestamps in nanoseconds."""
        import numpy as np
        import pyarrow as pa

        if not self._columns or not table.num_rows:
            return
        times = table.column(INSTANT)
        instants = (times.chunk(0) if times.num_chunks == 1 else times.combine_chunks()).view(pa.int64()).to_numpy()
        if self._is_csv and (instants % 1000).any():
            self._columns = {}  # DuckDB rounds text timestamps to microseconds
            return
        self._rows += table.num_rows
        self._first_ns = int(instants[0]) if self._first_ns is None else self._first_ns
        before_ns, self._last_ns = self._last_ns, int(instants[-1])
        self._device = table.column("device_id")[0].as_py() or None
        for name, sums in self._numbers.items():
            if name in self._columns and (values := _finite(table.column(name))).size:
                total = float(np.add.reduce(values, dtype=np.longdouble))
                sums.append((total, values.size, float(values.max())))
        last = range(
            int(np.searchsorted(instants, instants[-1])), table.num_rows
        )  # several rows can share the last timestamp
        columns = [table.column(name) if name in self._columns else None for name in LATEST[1:-1]]
        readings = [_reading(columns, row, self._last_ns) for row in last]
        if self._latest is not None and before_ns == self._last_ns:
            readings.append(self._latest)
        self._latest = readings[0] if len(readings) == 1 else max(readings, key=rank)

    def facts(self, key: str, etag: str, size_bytes: int) -> ObjectFacts | None:
        """The facts of the object in the version just written; None if only reading it can give them."""
        if not self._columns or self._first_ns is None or self._last_ns is None:
            return None
        first_us, last_us = self._first_ns // 1000, self._last_ns // 1000
        if first_us < 0 or first_us // DAY_US != last_us // DAY_US:
            return None
        voltage, temperature, soc = (self._numbers[name] for name in ("voltage", "temperature", "soc"))
        part = DaySummary(
            device=json.dumps(self._device),
            day=first_us // DAY_US,
            rows=self._rows,
            min_us=first_us,
            max_us=last_us,
            voltage_sum=sum(total for total, _, _ in voltage) if voltage else None,
            voltage_count=sum(count for _, count, _ in voltage),
            temperature_max=max((greatest for _, _, greatest in temperature), default=None),
            soc_sum=sum(total for total, _, _ in soc) if soc else None,
            soc_count=sum(count for _, count, _ in soc),
            latest=self._latest,
        )
        return ObjectFacts(key, etag, size_bytes, self._rows, self._columns, "", (part,))


def _columns(schema: "pa.Schema", *, is_csv: bool) -> dict[str, str]:
    """Name -> DuckDB type; empty if DuckDB would read a column differently than its name and type suggest."""
    found: dict[str, str] = {}
    for each in schema:
        arrow = str(getattr(each.type, "value_type", each.type))
        kind, low = TYPES.get(arrow, ""), each.name.lower()
        wanted = DOCUMENTED.get(low)
        is_odd = not each.name or (wanted is not None and each.name != low)
        is_other = wanted in ("DOUBLE", "SMALLINT") and arrow not in ("double", "int64", "int32", "int16", "uint64")
        if is_odd or is_other or (low in TEXTS and kind != "VARCHAR") or not (kind or is_csv):
            return {}
        found[each.name] = "VARCHAR" if is_csv else kind
    return found


def _finite(column: Any) -> Any:
    """The finite values of a numeric column as a float64 numpy array."""
    import numpy as np

    values = column.to_numpy().astype(np.float64, copy=False)
    return values[np.isfinite(values)]


def _reading(columns: Sequence[Any], row: int, instant_ns: int) -> tuple[Any, ...]:
    """The values of LATEST in a row, as reading the object would give them."""
    values = [None if column is None else column[row].as_py() for column in columns]
    numbers, texts = values[: len(NUMBERS)], values[len(NUMBERS) :]
    finite = (None if value is None or not math.isfinite(value) else float(value) for value in numbers)
    return (instant_ns // 1000, *finite, *(text or None for text in texts), instant_ns % 1000)
