"""The columns of the table: maps each column of an object to a column and type of the table.

Invariants: a column keeps its type, except for the widenings that Iceberg supports (int to long, float to double).
Values of another type go to a separate column, so that no value is rounded, truncated or lost. A type that the table
cannot hold is an error of its object.
"""

from collections.abc import Iterator, Mapping
from itertools import chain, count
from typing import Any

import pyarrow as pa

from app.core.errors import Rejected

TIMESTAMP, NANOS, DEVICE = "timestamp", "timestamp_nanos", "device_id"
FIRST: Mapping[str, str] = {
    TIMESTAMP: "timestamptz",
    DEVICE: "string",
    "device_type": "string",
    "location": "string",
    "voltage": "double",
    "current": "double",
    "power": "double",
    "temperature": "double",
    "hour": "int",
    "day_of_week": "int",
    "is_weekend": "boolean",
    "power_factor": "double",
    NANOS: "int",
}
"""The columns of a new table -> their types. Other columns follow."""
ARROW = {
    "boolean": pa.bool_(),
    "int": pa.int32(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "string": pa.string(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
    "timestamptz": pa.timestamp("us", "UTC"),
    "binary": pa.binary(),
    "decimal(20, 0)": pa.decimal128(20, 0),
}
"""Supported Iceberg column types -> the Arrow types in the table's files."""
WIDER = {"int": ("long",), "float": ("double",)}


def kind_of(arrow: Any) -> str:
    """The table's type for values of an Arrow type; "" if there is none."""
    checks = pa.types
    if checks.is_dictionary(arrow):
        return kind_of(arrow.value_type)
    if checks.is_integer(arrow):
        wide = arrow.bit_width + checks.is_unsigned_integer(arrow)
        return "int" if wide <= 32 else "long" if wide <= 64 else "decimal(20, 0)"  # noqa: PLR2004 - bits
    if checks.is_timestamp(arrow):
        return "" if arrow.unit == "ns" else "timestamptz" if arrow.tz else "timestamp"
    found = {
        "bool": "boolean",
        "halffloat": "float",
        "float": "float",
        "double": "double",
        "string": "string",
        "large_string": "string",
        "string_view": "string",
        "date32[day]": "date",
        "binary": "binary",
        "large_binary": "binary",
    }
    return found.get(str(arrow), "")


class LakeColumns:
    """The columns so far, in order. New columns of objects are added to `kinds` and `ids` (column -> Iceberg field id).

    The files carry the ids, since some readers identify columns only by id.
    """

    def __init__(self, kinds: Mapping[str, str], ids: Mapping[str, int], last_id: int) -> None:
        self.kinds = dict(kinds)
        self.ids = dict(ids)
        self._last_id = last_id

    def schema(self) -> Any:
        """The columns as an Arrow schema with field ids."""
        return pa.schema(
            [
                pa.field(name, ARROW[kind], metadata={"PARQUET:field_id": str(self.ids[name])})
                for name, kind in self.kinds.items()
            ]
        )

    def take(self, schema: Any) -> Mapping[str, str]:
        """Table column -> column of an object with this Arrow schema; adds and widens columns as needed.

        Raises Rejected for what the table cannot hold; then nothing has changed.
        """
        kinds = dict(self.kinds)
        folded = {name.casefold(): name for name in kinds}
        targets: dict[str, str] = {}
        for field in schema:
            known = field.name in (TIMESTAMP, NANOS, DEVICE) or str(field.type) == "null"
            kind = kinds.get(field.name, "string") if known else kind_of(field.type)
            if not kind:
                raise Rejected(
                    f"column {field.name} is {field.type}, which the table cannot hold", "cast it at its writer"
                )
            if folded.get(field.name.casefold(), field.name) != field.name:
                raise Rejected(f"column {field.name} differs in case only from another one", "rename it at its writer")
            # Not a column of the object's own, nor one that differs in case only: values would take its place.
            taken = {*schema.names, *targets} - {field.name}
            names = (each for each in _names(field.name, kind) if folded.get(each.casefold(), each) == each)
            name, wider = next(
                (each, wider) for each in names if each not in taken and (wider := _wider(kinds.get(each, kind), kind))
            )
            targets[name], kinds[name], folded[name.casefold()] = field.name, wider, name
        self.kinds = kinds
        for name in kinds.keys() - self.ids.keys():
            self._last_id += 1
            self.ids[name] = self._last_id
        return targets


def _names(name: str, kind: str) -> Iterator[str]:
    """The columns for values of this type, the preferred one first. The order is fixed, so that all values of one type
    of a field are in one column.
    """
    of_kind = f"{name}_as_{kind.partition('(')[0]}"
    return chain((name, of_kind), (f"{of_kind}_{number}" for number in count(2)))


def _wider(held: str, kind: str) -> str:
    """The type that holds the values of both types; "" if there is none."""
    return held if held == kind or held in WIDER.get(kind, ()) else kind if kind in WIDER.get(held, ()) else ""
