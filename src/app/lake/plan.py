"""What a run has to do: compare the objects of closed days with the table's files, and plan which files to rewrite.

A day of the table is cut into slices: ranges of devices, each with the files of one compaction. A file name holds the
day, the start of its range, and a digest of the keys and ETags of its source objects. Invariants: the plan depends only
on the two listings, so there is no state to lose. A slice with no objects left stays as it is, since a lifecycle rule
may have removed them on purpose.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from hashlib import blake2b
from itertools import groupby
from typing import Any

from app.core.closed_days import ListedVersion
from app.core.errors import Permanent
from app.core.windows import named_day
from app.object_store.port import ObjectStore

OBJECT = re.compile(r"device_id=([^/]+)/date=(.+)/export_\d{6}\.(parquet|csv)")
FILE = re.compile(r"date=(\d{4}-\d\d-\d\d)/(-|(?:[0-9a-f]{2})+)\.([0-9a-f]{32})\.(\d+)\.\d+\.[0-9a-f]+\.parquet")
MAX_BOUND_BYTES = 64  # in hex, twice as many characters of a file name
LAYOUT = "_headwater/layout.json"


@dataclass(frozen=True, slots=True)
class DeviceDay:
    """The Parquet objects of one device and UTC day in `folder` (ends with a slash); `csv` counts its CSV objects."""

    device: str
    day: date
    folder: str
    objects: int
    size_bytes: int
    digest: bytes
    csv: int = 0


@dataclass(frozen=True, slots=True)
class LakeFile:
    """A file of the table. `entry`: its pyiceberg entry. `missing`: it is gone from the store, truncated or damaged."""

    key: str
    day: date
    entry: Any
    missing: bool = False

    @property
    def named(self) -> "re.Match[str] | None":
        """The parts of our file name: day, bound, digest, number set aside. None for another program's file."""
        return FILE.search(self.key)


@dataclass(frozen=True, slots=True)
class Slice:
    """The files of a range of devices of a day, starting at `bound`."""

    bound: bytes
    files: Sequence[LakeFile]

    @property
    def objects_aside(self) -> int:
        """How many of its objects were set aside."""
        return max((int(file.named[4]) for file in self.files if file.named), default=0)

    def is_made_from(self, members: Sequence[DeviceDay]) -> bool:
        """Whether it is made from exactly these objects; it may also hold rows whose objects are gone."""
        wanted = slice_digest(members)
        as_named = (not file.missing and file.named and file.named[3] == wanted for file in self.files)
        return bool(self.files) and all(as_named)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A slice to be written: its ordered devices, all from `bound` on, and the table's files that it replaces."""

    day: date
    bound: bytes
    members: Sequence[DeviceDay]
    replaced: Sequence[LakeFile] = ()

    @property
    def objects(self) -> int:
        """The number of source objects."""
        return sum(member.objects for member in self.members)


@dataclass(slots=True)
class LakePlan:
    """What to do. `kept`: objects whose slice is up to date; `kept_aside`: those of them that were set aside."""

    rewrites: list[Rewrite] = field(default_factory=list)
    kept: int = 0
    kept_aside: int = 0


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """What the tree's layout file says about names: all date formats ever used, and window lengths by first day."""

    date_formats: tuple[str, ...]
    windows: Sequence[tuple[date, int]]

    def window_seconds(self, day: date) -> int:
        """The window length of a day."""
        return next((seconds for since, seconds in reversed(self.windows) if since <= day), self.windows[0][1])


def read_layout(store: ObjectStore, prefix: str, date_format: str, window_seconds: int) -> TreeLayout:
    """Read `_headwater/layout.json` of the tree, or use the settings if there is none. Raises Permanent."""
    key = f"{prefix}/{LAYOUT}"
    with store.open(key) as body:
        text = body.read() if body else None
    if text is None:
        return TreeLayout((date_format,), [(date.min, window_seconds)])
    try:
        layouts = json.loads(text)["layouts"]
        windows = sorted((date.fromisoformat(each["from"][:10]), int(each["window_seconds"])) for each in layouts)
        return TreeLayout(tuple(dict.fromkeys(str(each["date_format"]) for each in layouts)), windows)
    except (ValueError, KeyError, TypeError) as error:
        raise Permanent(f"{key} cannot be read: {error}", "restore an earlier version of this object") from error


def place_of(key: str, prefix: str, layout: TreeLayout) -> tuple[str, date] | None:
    """Device and day of an exported object; None for any other key."""
    named = OBJECT.fullmatch(key, len(prefix) + 1)
    day = _day(named[2], layout.date_formats) if named else None
    return (named[1], day) if named and day else None


def closed_days(infos: Iterable[ListedVersion], prefix: str, layout: TreeLayout, before: date) -> Iterator[DeviceDay]:
    """The device days before `before` in a listing of the tree, in its order."""
    start = len(prefix) + 1

    def folder_of(info: ListedVersion) -> str:
        return info.key.rpartition("/")[0]

    for folder, group in groupby(infos, folder_of):
        exported = [info for info in group if OBJECT.fullmatch(info.key, start)]
        place = place_of(exported[0].key, prefix, layout) if exported else None
        if place and place[1] < before:
            taken = [info for info in exported if info.key.endswith(".parquet")]
            size_bytes, csv = sum(info.size_bytes for info in taken), len(exported) - len(taken)
            yield DeviceDay(*place, f"{folder}/", len(taken), size_bytes, digest_of(taken), csv)


def digest_of(infos: Iterable[ListedVersion]) -> bytes:
    """A digest of the keys and versions of a device day's objects."""
    digest = blake2b(digest_size=16)
    for info in infos:
        digest.update(f"{info.key}\n{info.etag}\n".encode())
    return digest.digest()


def slice_digest(members: Iterable[DeviceDay]) -> str:
    """A digest of all objects of a slice, as used in its file names."""
    digest = blake2b(digest_size=16)
    for member in members:
        digest.update(member.digest)
    return digest.hexdigest()


def ends_at(day: date) -> datetime:
    """The midnight at the end of the day."""
    return datetime.combine(day, time(), UTC) + timedelta(days=1)


def plan(days: Iterable[DeviceDay], files: Iterable[LakeFile], max_bytes: int) -> LakePlan:
    """What to do so that the table matches the objects, oldest day first."""
    held: dict[date, list[LakeFile]] = {}
    for file in files:
        held.setdefault(file.day, []).append(file)
    found: dict[date, list[DeviceDay]] = {}
    for member in days:
        found.setdefault(member.day, []).append(member)
    made = LakePlan()
    for day in sorted(found):
        slices = slices_of(held.get(day, []))
        for one, own in zip(slices, in_slices(found[day], slices), strict=True):
            if own and one.is_made_from(own):
                made.kept += sum(member.objects for member in own)
                made.kept_aside += one.objects_aside
            elif own:
                made.rewrites += _cut(day, one.bound, own, one.files, max_bytes)
    return made


def slices_of(files: Sequence[LakeFile]) -> Sequence[Slice]:
    """The slices of a day, in order; the first one starts before every device, and may have no files."""
    by_bound: dict[bytes, list[LakeFile]] = {b"": []}
    for file in files:
        # A day with another program's file is a single slice, since that file may hold any device.
        ours = file.named if all(each.named for each in files) else None
        by_bound.setdefault(bytes.fromhex(ours[2].strip("-")) if ours else b"", []).append(file)
    return [Slice(bound, by_bound[bound]) for bound in sorted(by_bound)]


def in_slices(members: Iterable[DeviceDay], slices: Sequence[Slice]) -> Sequence[Sequence[DeviceDay]]:
    """For each slice of a day, its members that have Parquet objects, ordered by device."""
    bounds = [one.bound for one in slices]
    found: list[list[DeviceDay]] = [[] for _ in slices]
    for member in sorted(members, key=lambda one: (one.device.encode(), one.folder)):
        if member.objects:
            found[bisect_right(bounds, member.device.encode()) - 1].append(member)
    return found


def _cut(
    day: date, bound: bytes, members: Sequence[DeviceDay], replaced: Sequence[LakeFile], max_bytes: int
) -> Iterator[Rewrite]:
    """Slices of at most `max_bytes` of objects, unless one device has more. The first replaces all of `replaced`."""
    part: list[DeviceDay] = []
    size_bytes = 0
    for member in members:
        next_bound = separator(part[-1].device, member.device) if part else b""
        if size_bytes + member.size_bytes > max_bytes and next_bound:
            yield Rewrite(day, bound, part, replaced)
            bound, part, size_bytes, replaced = next_bound, [], 0, ()
        part.append(member)
        size_bytes += member.size_bytes
    yield Rewrite(day, bound, part, replaced)


def separator(before: str, device: str) -> bytes:
    """The shortest prefix of `device` that is greater than `before`; empty if there is none short enough for a name."""
    lower, upper = before.encode(), device.encode()
    shortest = next((upper[:size] for size in range(1, len(upper) + 1) if upper[:size] > lower), b"")
    return shortest if len(shortest) <= MAX_BOUND_BYTES else b""


def file_name(rewrite: Rewrite, aside: int, part: int, nonce: str) -> str:
    """A file name below the table's data folder; never reused."""
    bound = rewrite.bound.hex() or "-"
    digest = slice_digest(rewrite.members)
    return f"date={rewrite.day.isoformat()}/{bound}.{digest}.{aside}.{part}.{nonce}.parquet"


@lru_cache(maxsize=1024)
def _day(text: str, formats: tuple[str, ...]) -> date | None:
    return next((day for each in formats if (day := named_day(text, each))), None)
