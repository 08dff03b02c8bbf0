"""The documented columns, computed from canonical rows.

Order: timestamp, device_id, device_type, location, voltage, current, power, temperature, hour, day_of_week, is_weekend,
power_factor, then further tags and further fields, each alphabetically. Invariant: a column has the same type in every
object of a layout, whatever a window holds; the documented ones exist even without such a field (then null).
"""

from typing import TYPE_CHECKING, Any

from app.influx_to_s3.columns import COMPUTED, DEVICE, MEASURED, TAGS, TIMESTAMP, Columns
from app.influx_to_s3.rows import instants_of

if TYPE_CHECKING:
    import pyarrow as pa

HOUR_NS = 3_600_000_000_000
DAY_NS = 24 * HOUR_NS
THURSDAY, FRIDAY = 3, 4


def output_schema(rows: "pa.Schema", columns: Columns) -> "pa.Schema":
    """The columns of an object whose canonical rows have the schema `rows`.

    device_id has dictionary type, as pandas takes the `device_id=` in paths: it merges the two only then.
    """
    import pyarrow as pa

    others = [column for column in rows if column.name not in (TIMESTAMP, *TAGS, *MEASURED)]
    return pa.schema(
        [
            (TIMESTAMP, pa.timestamp("ns", "UTC")),
            (DEVICE, pa.dictionary(pa.int32(), pa.string())),
            *((name, pa.string()) for name in TAGS),
            *((name, pa.float64()) for name in MEASURED),
            *zip(COMPUTED, (pa.int32(), pa.int32(), pa.bool_(), pa.float64()), strict=True),
            *(
                pa.field(each.name, each.type, metadata=columns.describe(each.name))
                for each in sorted(others, key=lambda each: (each.name not in columns.tags, each.name))
            ),
        ]
    )


def enrich(table: "pa.Table", device: str, schema: "pa.Schema") -> "pa.Table":
    """Canonical rows with the computed columns, as `schema` from `output_schema`."""
    import pyarrow as pa

    columns: dict[str, Any] = {name: table.column(name) for name in table.column_names}
    columns[DEVICE] = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), table.num_rows), [device])
    for name in MEASURED:
        columns.setdefault(name, pa.nulls(table.num_rows, pa.float64()))
    columns |= _calendar(table)
    columns["power_factor"] = _power_factor(columns["voltage"], columns["current"], columns["power"])
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _calendar(table: "pa.Table") -> dict[str, Any]:
    """hour 0-23 and day_of_week (Monday = 0) of the UTC instant; 1970-01-01 was a Thursday."""
    import numpy as np
    import pyarrow as pa

    instants = instants_of(table)
    if len(instants) and instants[0] // HOUR_NS == instants[-1] // HOUR_NS:  # rows are in order: all of one hour
        return _of_one_hour(int(instants[0]), len(instants))
    hour = (instants // HOUR_NS % 24).astype(np.int32)
    day = ((instants // DAY_NS + THURSDAY) % 7).astype(np.int32)
    return {"hour": pa.array(hour), "day_of_week": pa.array(day), "is_weekend": pa.array(day > FRIDAY)}


def _of_one_hour(instant: int, rows: int) -> dict[str, Any]:
    """What `_calendar` gives for `rows` instants of the hour that holds `instant`."""
    import pyarrow as pa

    hour, day = instant // HOUR_NS % 24, (instant // DAY_NS + THURSDAY) % 7
    return {
        "hour": pa.repeat(pa.scalar(hour, pa.int32()), rows),
        "day_of_week": pa.repeat(pa.scalar(day, pa.int32()), rows),
        "is_weekend": pa.repeat(pa.scalar(day > FRIDAY), rows),
    }


def _power_factor(voltage: Any, current: Any, power: Any) -> Any:
    """power / (voltage * current) clipped to [0, 1]; null where an input is null or the quotient is not a number."""
    import numpy as np
    import pyarrow as pa

    volts, amperes, watts = (_floats(column) for column in (voltage, current, power))
    with np.errstate(all="ignore"):
        apparent = volts * amperes
        factor = np.clip(watts / apparent, 0.0, 1.0)
    unknown = ~np.isfinite(factor) | (apparent == 0.0)
    return pa.array(factor, mask=unknown)


def _floats(column: Any) -> Any:
    """float64 with NaN for null, a numpy array."""
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.to_numpy(zero_copy_only=False)
