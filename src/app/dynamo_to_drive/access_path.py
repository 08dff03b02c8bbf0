"""Chooses the cheapest way to read one hour of a table, from the answer of DescribeTable.

Invariant: a plan never misses rows. An index is used only if it is active, complete and projects all attributes; a scan
is the last resort, is logged, and has a size limit. Source: contracts/dynamodb.md, sections 2 to 5.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from app.config.settings import DynamoSettings
from app.core.errors import Permanent

STATIC = "static_partition"
STATIC_VALUES = ("data",)
UNIT_BYTES = 4096
SEGMENTS = 4


@dataclass(frozen=True, slots=True)
class AccessPath:
    """How to read the table. `hash_name` "" = scan. Types are DynamoDB's letters; `key` has the primary key attributes.

    `left_out` is the attribute with the same value in all rows, which gets no column; "" if there is none.
    """

    key: tuple[str, ...]
    hash_name: str = ""
    hash_type: str = "S"
    hash_values: tuple[str, ...] = ()
    timestamp_type: str = "S"
    index: str = ""
    consistent: bool = True
    left_out: str = ""
    size_bytes: int = 0

    @property
    def scans(self) -> bool:
        """True if each read costs a scan of the whole table."""
        return not self.hash_name

    @property
    def way(self) -> "AccessPath":
        """The same path without the table size, for comparison."""
        return replace(self, size_bytes=0)

    @property
    def scan_units(self) -> int:
        """Read units of one full consistent scan, from the size that DynamoDB reports (up to six hours old)."""
        return -(-self.size_bytes // UNIT_BYTES)


def plan_of(table: Mapping[str, Any], wanted: DynamoSettings) -> AccessPath:
    """The cheapest complete access path. Raises Permanent if only a scan is left and the table exceeds the limit."""
    types = {each["AttributeName"]: each["AttributeType"] for each in table["AttributeDefinitions"]}
    key = tuple(each["AttributeName"] for each in table["KeySchema"])
    size_bytes = int(table.get("TableSizeBytes") or 0)
    for index, hash_name, consistent in _ways(table, wanted.timestamp_attribute):
        values = tuple(wanted.partition_values) or (STATIC_VALUES if hash_name == STATIC else ())
        if values and types[wanted.timestamp_attribute] in "SN":
            return AccessPath(
                key=key,
                hash_name=hash_name,
                hash_type=types[hash_name],
                hash_values=tuple(dict.fromkeys(values)),
                timestamp_type=types[wanted.timestamp_attribute],
                index=index,
                consistent=consistent,
                left_out=hash_name if len(values) == 1 else "",
                size_bytes=size_bytes,
            )
    if size_bytes > wanted.scan_max_bytes:
        raise Permanent(
            f"table {wanted.table_name} can only be scanned, and its {size_bytes} bytes are above "
            f"{wanted.scan_max_bytes}",
            index_advice(table, wanted)
            + ", or raise DYNAMODB_SCAN_MAX_BYTES and pay for a whole scan per hour and run",
        )
    return AccessPath(key=key, size_bytes=size_bytes)


def index_advice(table: Mapping[str, Any], wanted: DynamoSettings) -> str:
    """A hint on how to make this table queryable instead of scanning it."""
    timestamp = wanted.timestamp_attribute
    for _, hash_name, _ in _ways(table, timestamp):
        return f"set DYNAMODB_PARTITION_VALUES to the values of {hash_name!r}"
    return f"add an index with sort key {timestamp!r} and projection ALL, or set DYNAMODB_TIMESTAMP_ATTRIBUTE"


def _ways(table: Mapping[str, Any], timestamp: str) -> Iterator[tuple[str, str, bool]]:
    """The table ("") and the complete indexes that sort by the timestamp, consistent ones first.

    Yields the index name, its partition key attribute, and whether reads are consistent.
    """
    local, remote = (table.get(f"{kind}SecondaryIndexes") or () for kind in ("Local", "Global"))
    ready = [each for each in remote if each.get("IndexStatus", "ACTIVE") == "ACTIVE" and not each.get("Backfilling")]
    whole = [each for each in (*local, *ready) if each["Projection"]["ProjectionType"] == "ALL"]
    for described in (table, *whole):
        names: dict[str, list[str]] = {"HASH": [], "RANGE": []}
        for each in described["KeySchema"]:
            names[each["KeyType"]].append(each["AttributeName"])
        if len(names["HASH"]) == 1 and names["RANGE"][:1] == [timestamp]:
            yield described.get("IndexName", ""), names["HASH"][0], described not in ready
