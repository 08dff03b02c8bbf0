"""What people and other programs need of an object store beside whole objects: bodies of unknown length, changes in the
middle of an object, parts of it, pages of a listing.

Invariants of every implementation: memory is bounded whatever the size; a body that breaks off changes nothing; what a
change was made on is what it replaces, and `guarded` says whether the store itself saw to that.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from app.stores.objects import ObjectInfo, Put

MAX_PAGE = 1000
MARK = "headwater-write"
"""Metadata that tells which write made an object; no business of whoever reads it."""


class Readable(Protocol):
    """A body. It need not be seekable, and blocks until there is something."""

    def read(self, count: int, /) -> bytes:
        """At most `count` bytes, `count` > 0; none at the end only. What it raises ends the transfer."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What was stored. `version_id` None = the store keeps no versions.

    `guarded` False: the store ignores conditions, so that the version was only looked at before it was replaced.
    """

    etag: str
    size_bytes: int
    version_id: str | None = None
    guarded: bool = True


@dataclass(frozen=True, slots=True)
class Question:
    """What to list. Keys with `delimiter` after the prefix are rolled up to the part before and with it; "" = none.

    `continuation` is what the page before gave; "" = the first page. `limit` counts keys and rolled up prefixes.
    """

    prefix: str = ""
    delimiter: str = ""
    limit: int = MAX_PAGE
    continuation: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing. `continuation` "" = the last one."""

    objects: Sequence[ObjectInfo]
    prefixes: Sequence[str] = ()
    continuation: str = ""


class Transfers(Protocol):
    """Raises what the object store raises; may be called from any thread."""

    def write(self, key: str, body: Readable, put: Put) -> Stored:
        """Store a body to its end under the condition of `put`. Raises Conflict; our own lost answer is none."""

    def patch(self, held: ObjectInfo, offset: int, body: Readable) -> Stored:
        """Overwrite from `offset` on, at most the size of `held`; what is not overwritten stays, type and metadata too.

        `held` is what `head` gave. Raises Conflict when that is no longer there.
        """

    def open_span(self, held: ObjectInfo, first: int, count: int) -> AbstractContextManager[Readable]:
        """The bytes `[first, first + count)` of exactly this version; Conflict when it is gone, never a short end."""

    def page(self, question: Question) -> Page:
        """One page. Raises Rejected for a continuation that is none."""
