"""How the objects of an export are named, and the metadata that their writers stored.

Deltas: additional objects of a window, which older versions wrote for late rows, named by the seconds after its start.

One rule for every reader: skip a delta whose rows the object of its window holds, since the delta stays forever where
deletion is refused. The object's metadata says which these are (`folded`, the highest second), and is requested only
where a window may have both. Invariant: a window is known from its writers' metadata, never guessed from names.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from app.core.errors import Rejected
from app.core.pipeline import ObjectState
from app.object_store.port import CONTROL, ObjectInfo, ObjectStore

NAME = re.compile(r"(?P<folder>(?:.*/)?)export_(\d\d)(\d\d)(\d\d)\.(?P<format>parquet|csv)", re.DOTALL)
WINDOW = re.compile(r"[\d-]{10}T(\d\d):(\d\d):(\d\d)Z/[\d-]{10}T(\d\d):(\d\d):(\d\d)Z")
DAY = 86_400
FOLDER = "device_id="
MAX_DEVICE_BYTES = 255

Head = Callable[[ObjectInfo | str], ObjectInfo | None]
"""The properties of a listed object, or of a key; None if it is gone or access is denied."""


@dataclass(frozen=True, slots=True)
class UnfoldedDeltas:
    """A listing without folded deltas. An object whose metadata was requested has its version at that time.

    `is_whole`: the listing includes the object of each delta, so the result depends on nothing else.
    """

    infos: Sequence[ObjectInfo]
    is_whole: bool


@dataclass(frozen=True, slots=True)
class _Noted:
    """Metadata of a window's object: seconds of the day from `start` to before `end`, and the highest folded part."""

    start: int = 0
    end: int = 0
    folded: int = 0

    def covers(self, second: int) -> bool:
        return self.start < second < self.end


def check_device(device: str, store: ObjectStore) -> None:
    """Raises Rejected for an id that cannot be part of a key of this store unchanged."""
    problem = ""
    longest_bytes = min(MAX_DEVICE_BYTES, store.segment_bytes - len(FOLDER))
    if not device or "/" in device or ".." in device:
        problem = "is empty or holds '/' or '..'"
    elif "\\" in device:
        problem = "holds a backslash, which some stores take for a slash"
    elif not CONTROL.isdisjoint(device):
        problem = "holds a control character"
    elif len(device.encode("utf-8", "surrogatepass")) > longest_bytes:
        problem = f"is longer than {longest_bytes} bytes"
    if problem:
        raise Rejected(
            f"device id {device[:80]!r} {problem}, so it cannot name an object",
            "rename the device at its writer, or leave it out by listing the others in DEVICE_IDS",
        )


def is_nameable(device: str, store: ObjectStore) -> bool:
    """True for a device whose id can be part of a key of this store."""
    try:
        check_device(device, store)
    except Rejected:
        return False
    return True


def state_from_metadata(info: ObjectInfo) -> ObjectState:
    """The state in an object's metadata; empty fields if a person put the object there."""
    return ObjectState(
        version=info.etag,
        digest=info.metadata.get("digest", ""),
        write=info.metadata.get("write", ""),
        folded=info.number("folded") or 0,
        rows=info.number("rows"),
        size_bytes=info.size_bytes,
        tags=info.metadata.get("tags", ""),
    )


def named_second(key: str) -> int | None:
    """The second of the day in the name of a window's object or a delta; None for any other key."""
    named = NAME.fullmatch(key)
    return named and _second(*named.groups()[1:4])


def window_from_metadata(info: ObjectInfo) -> tuple[int, int] | None:
    """The window in the object's metadata, as seconds of its day; None for another program's object."""
    noted = WINDOW.fullmatch(info.metadata.get("window", ""))
    return noted and (_second(*noted.groups()[:3]), _second(*noted.groups()[3:]) or DAY)


def unfolded_deltas(infos: Iterable[ObjectInfo], head: Head, *, window_seconds: int = 60) -> UnfoldedDeltas:
    """`infos` without the deltas whose rows the object of their window holds.

    `window_seconds`: the names of windows are multiples of it; if unknown, the shortest window. Objects with other
    names are checked. Raises what `head` raises.
    """
    listed = list(infos)
    days: dict[tuple[str, str], dict[int, ObjectInfo]] = {}
    for info in listed:
        if named := NAME.fullmatch(info.key):
            second = _second(*named.groups()[1:4])
            days.setdefault((named["folder"], named["format"]), {})[second] = info
    changes: dict[str, ObjectInfo | None] = {}
    is_whole = True
    for (folder, suffix), day in days.items():
        if any(second % window_seconds for second in day):
            look = _Look(folder, suffix, day, head, changes)
            look.over(window_seconds)
            is_whole &= look.is_whole
    left = (changes.get(info.key, info) for info in listed) if changes else listed
    return UnfoldedDeltas([info for info in left if info is not None], is_whole)


@dataclass(slots=True)
class _Look:
    """A check of one day of one device. `changes`: the replacement for a key's entry, None for a folded delta."""

    folder: str
    suffix: str
    day: dict[int, ObjectInfo]
    head: Head
    changes: dict[str, ObjectInfo | None]
    is_whole: bool = True

    def over(self, window_seconds: int) -> None:
        """Check every object whose name may be that of a delta, after the object before it."""
        noted, before = _Noted(), None
        for second, info in sorted(self.day.items()):
            if not noted.covers(second) and second % window_seconds == 0:
                noted, before = _Noted(), second
                continue
            if not noted.covers(second) and before is not None:
                noted, before = self._ask(before), None
            if not noted.covers(second):
                noted = self._ask(second)
            if noted.covers(second) and second - noted.start <= noted.folded:
                self.changes[info.key] = None

    def _ask(self, second: int) -> _Noted:
        """The window metadata of the object with this name; for a delta, that of its window's object."""
        info = self.head(self.day[second])
        window = window_from_metadata(info) if info else None
        if info is None or window is None:
            return _Noted()
        start, end = window
        if start == second:
            self.changes[info.key] = info
        elif not start < second < end:
            return _Noted()  # a copy of another window's object
        elif start in self.day:
            return _Noted(start, end)  # already checked: it has no window metadata
        else:
            self.is_whole = False
            named = f"{start // 3600:02d}{start // 60 % 60:02d}{start % 60:02d}"
            info = self.head(f"{self.folder}export_{named}.{self.suffix}")
            if info is None or window_from_metadata(info) != window:
                return _Noted(start, end)
        return _Noted(start, end, info.number("folded") or 0)


def _second(hours: str, minutes: str, seconds: str) -> int:
    return (int(hours) * 60 + int(minutes)) * 60 + int(seconds)
