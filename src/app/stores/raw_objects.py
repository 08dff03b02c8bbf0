"""Objects that hold what a service gave, as it gave it: one per window, told by the digest of its rows.

Invariants: the same rows are not stored twice, however their order or their bytes differ; an object is replaced only
while it is the version that was looked at, and one that is whole never by one with fewer rows.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO, Protocol

from app.core.errors import Permanent
from app.core.ports import Held, Record
from app.core.repair import GONE_HINT
from app.core.verify import Content
from app.core.window import Window
from app.stores.objects import ObjectInfo, ObjectStore, Put

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RawObject:
    """What an object is: `rows` of a window, and the digest that tells these rows from others."""

    pipeline: str
    key: str
    window: Window
    content_type: str
    rows: int
    digest: str

    @property
    def metadata(self) -> Mapping[str, str]:
        """What is noted with the object."""
        return {
            "pipeline": self.pipeline,
            "window": str(self.window),
            "rows": str(self.rows),
            "digest": self.digest,
        }


class PutPolicy(Protocol):
    """How the object of a window is stored."""

    def __call__(self, store: ObjectStore, file: BinaryIO, what: RawObject) -> Held:
        """What is there then. Raises Conflict when somebody else writes the same object at this moment."""


def keep(store: ObjectStore, file: BinaryIO, what: RawObject) -> Held:
    """Store `file` from its beginning unless the object holds these rows already; what is there then.

    Raises Conflict when somebody else writes the same object at this moment: read the service again, then repeat.
    """
    there = store.head(what.key)
    held = held_of(there) if there else None
    if held is not None and held.digest == what.digest:
        return held
    if held is not None and (held.rows or 0) > what.rows:
        log.warning("%s holds %s rows, the service now gives %d: it stays", what.key, held.rows, what.rows)
        return held
    return in_place_of(held.version if held else "")(store, file, what)


def in_place_of(version: str) -> PutPolicy:
    """Store over this very version, whatever it holds; "" = nothing is there."""

    def stored(store: ObjectStore, file: BinaryIO, what: RawObject) -> Held:
        size_bytes = file.seek(0, 2)
        file.seek(0)
        etag = store.put(what.key, file, Put(what.content_type, what.metadata, version))
        return replace(Held(etag), digest=what.digest, rows=what.rows, size_bytes=size_bytes)

    return stored


@dataclass(frozen=True, slots=True)
class There:
    """An object as it was found before the service was asked: its version ("" = none), and what it holds (None = it
    cannot be read).
    """

    key: str
    version: str
    content: Content | None


def mending(there: There, given: Content, record: Record | None) -> PutPolicy | None:
    """How to store what the service gives now; None = what is there stays, since the service no longer has all of it.

    Raises Permanent when the object is damaged or foreign and the service has no rows to put in its place.
    """
    if there.content == given:
        return keep
    whole = there.content if record and there.version and there.version == record.version else None
    if whole is not None and whole.rows > given.rows:
        return None
    if not given.rows:
        raise Permanent(f"{there.key}: was changed, and the service has no rows of it", GONE_HINT)
    return in_place_of(there.version)


def held_of(info: ObjectInfo) -> Held:
    """What an object's metadata says; an object that a person put there says nothing."""
    rows = info.metadata.get("rows", "")
    return Held(
        version=info.etag,
        digest=info.metadata.get("digest", ""),
        rows=int(rows) if rows.isdigit() else None,
        size_bytes=info.size_bytes,
    )
