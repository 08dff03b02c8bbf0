"""Objects that hold what a service gave, as it gave it: one per window, told by the digest of its rows.

Invariants: the same rows are not stored twice, however their order or their bytes differ; an object is replaced only
while it is the version that was looked at, and never by one with fewer rows.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO

from app.core.ports import Held
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
    size_bytes = file.seek(0, 2)
    file.seek(0)
    etag = store.put(what.key, file, Put(what.content_type, what.metadata, held.version if held else ""))
    return replace(Held(etag), digest=what.digest, rows=what.rows, size_bytes=size_bytes)


def held_of(info: ObjectInfo) -> Held:
    """What an object's metadata says; an object that a person put there says nothing."""
    rows = info.metadata.get("rows", "")
    return Held(
        version=info.etag,
        digest=info.metadata.get("digest", ""),
        rows=int(rows) if rows.isdigit() else None,
        size_bytes=info.size_bytes,
    )
