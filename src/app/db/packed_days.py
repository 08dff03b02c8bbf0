"""What /analytics sums of the objects of closed days, packed: one row of the state for a device and day.

Invariants: what is known of a version is either in the tables of `object_summaries` or packed; packing and unpacking
lose nothing of it and are one transaction each, which begins with a lock on the day's row. Saving into a folder unpacks
it, so that nothing is known twice.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from itertools import groupby
from typing import Any
from zlib import compress, decompress

from app.core.windows import EPOCH
from app.db.database import NamedQueries, Row, Session, instant_text

FIRST_AT, LAST_AT = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)
PART = (
    *("row_count", "min_us", "max_us", "voltage_sum", "voltage_count", "temperature_max", "soc_sum", "soc_count"),
    "latest",
)
"""The columns of a part after its device and day."""


def version_of(key: str, etag: str) -> bytes:
    """16 bytes that stand for one version of one object: small in memory, and no two versions share them."""
    return blake2b(f"{key}\n{etag}".encode(), digest_size=16).digest()


def folder_of(key: str) -> str:
    """What comes before the last slash of a key."""
    return key.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class PackedObject:
    """A version, whose rows are all of one device and day; `part`: the values of PART."""

    version: bytes
    key: str
    etag: str
    size_bytes: int
    schema_id: str
    part: Sequence[Any]


@dataclass(frozen=True, slots=True)
class PackedDay:
    """A device and day of a pipeline, whose objects lie in `folder`. `facts`: the list of their names, that of their
    ETags, sizes, schemas, and of each value of PART, in JSON, compressed: a sixth of what they take in rows; None for
    none.
    """

    pipeline: str
    device_id: str
    day_at: datetime
    folder: str
    facts: bytes | None

    @property
    def device(self) -> str:
        """As `DaySummary` has it."""
        return json.dumps(self.device_id)

    @property
    def day(self) -> int:
        """Counted from 1970-01-01."""
        return (self.day_at - EPOCH).days

    def lists(self) -> Iterator[Sequence[Any]]:
        """One of each object."""
        if self.facts:
            yield from zip(*json.loads(decompress(self.facts)), strict=True)

    def objects(self) -> Iterator[PackedObject]:
        """All of them."""
        for name, etag, size_bytes, schema_id, *part in self.lists():
            key = f"{self.folder}/{name}"
            yield PackedObject(version_of(key, etag), key, etag, size_bytes, schema_id, part)


class PackedDays:
    """Those of the state. All methods work in a transaction of the caller's."""

    def __init__(self, queries: NamedQueries) -> None:
        self._queries = queries

    def in_folders(self, session: Session, folders: Collection[str]) -> Sequence[PackedDay]:
        """Those whose objects lie there."""
        if not folders:
            return []
        return _days(session.rows(self._queries["packed_in_folders"], folders=json.dumps(list(folders))))

    def of_pairs(self, session: Session, pairs: Collection[tuple[str, int]]) -> Sequence[PackedDay]:
        """Of these devices, as JSON text, and days."""
        wanted = [
            [json.loads(device), instant_text(EPOCH + timedelta(days=day))]
            for device, day in pairs
            if 0 <= day < (LAST_AT - EPOCH).days
        ]
        return _days(session.rows(self._queries["packed_of_pairs"], pairs=json.dumps(wanted)))

    def between(
        self, session: Session, device: str | None = None, first_day: int | None = None, last_day: int | None = None
    ) -> Iterator[PackedDay]:
        """Of this device, as JSON text, and of these days; None = not limited."""
        since_at = FIRST_AT if first_day is None else EPOCH + timedelta(days=first_day)
        until_at = LAST_AT if last_day is None else EPOCH + timedelta(days=last_day)
        wanted = None if device is None else json.loads(device)
        rows = session.stream(self._queries["packed_days"], device=wanted, since_at=since_at, until_at=until_at)
        for pipeline, device_id, day_at, *rest in rows:
            at = datetime.fromisoformat(day_at) if isinstance(day_at, str) else day_at
            yield PackedDay(pipeline, device_id, at, *rest)

    def pack(self, session: Session, pipeline: str, partition: str, before_day: int) -> None:
        """Pack what the tables have of a device's exported objects with rows of one earlier day only. Idempotent."""
        found = session.rows(self._queries["loose_objects"], device=json.dumps(partition), day=before_day)
        exported = (row for row in found if f"device_id={partition}" in row["object_key"].split("/"))
        in_order = sorted(exported, key=lambda row: (row["day"], row["object_key"]))
        for (day, folder), rows in groupby(in_order, lambda row: (row["day"], folder_of(row["object_key"]))):
            held = self._held(session, pipeline, partition, EPOCH + timedelta(days=day))
            if held.folder not in ("", folder):
                continue
            lists, ids = list(held.lists()), []
            for row in rows:
                ids.append(row["object_id"])
                name = row["object_key"].removeprefix(f"{folder}/")
                lists.append([name, row["etag"], row["size_bytes"], row["schema_id"], *(row[each] for each in PART)])
            self._save(session, held, folder, lists)
            session.run(self._queries["forget_parts"], ids=json.dumps(ids))
            session.run(self._queries["forget_objects"], ids=json.dumps(ids))

    def unpack(self, session: Session, days: Collection[PackedDay]) -> None:
        """Give what was packed back to the tables. Idempotent."""
        for each in days:
            day = self._held(session, each.pipeline, each.device_id, each.day_at)
            rows: list[Row] = [
                {
                    **dict(zip(PART, one.part, strict=True)),
                    "object_id": one.version.hex(),
                    "key": one.key,
                    "etag": one.etag,
                    "size_bytes": one.size_bytes,
                    "schema_id": one.schema_id,
                    "rows": one.part[0],
                    "fault": "",
                    "place": 0,
                    "device": day.device,
                    "day": day.day,
                }
                for one in day.objects()
            ]
            session.run_many(self._queries["save_part"], rows)
            session.run_many(self._queries["save_object"], rows)
            self._save(session, day, "", [])

    def holding(self, session: Session, versions: Collection[bytes]) -> Sequence[PackedDay]:
        """Those that hold any of these versions, which takes a look at all."""
        return [day for day in self.between(session) if any(one.version in versions for one in day.objects())]

    def _held(self, session: Session, pipeline: str, partition: str, day_at: datetime) -> PackedDay:
        """The row of a day, made where there is none, and locked until the transaction ends."""
        of = {"pipeline": pipeline, "partition": partition, "day_at": day_at}
        (row,) = session.rows(self._queries["hold_day"], **of)
        return PackedDay(pipeline, partition, day_at, row["folder"], row["facts"])

    def _save(self, session: Session, day: PackedDay, folder: str, lists: Sequence[Sequence[Any]]) -> None:
        of = {"pipeline": day.pipeline, "partition": day.device_id, "day_at": day.day_at}
        text = json.dumps(list(zip(*lists, strict=True)), separators=(",", ":"))
        facts = compress(text.encode()) if lists else None
        session.run(self._queries["save_packed"], **of, folder=folder, objects=len(lists), facts=facts)


def _days(rows: Sequence[Row]) -> Sequence[PackedDay]:
    return [PackedDay(**row) for row in rows]
