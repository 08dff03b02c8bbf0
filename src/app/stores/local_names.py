"""Whether a file system keeps names as they are given: some ignore case, some rewrite Unicode or drop a last dot.

Invariant: where names are kept, as on nearly every server, a look costs nothing; elsewhere each segment is compared
with the names that its folder really holds.
"""

import os
import unicodedata
from collections.abc import Callable, Collection
from pathlib import Path
from uuid import uuid4

from app.stores.local_listing import ABSENT

PROBE = "e\N{COMBINING ACUTE ACCENT}\N{LATIN SMALL LETTER E WITH ACUTE} a."

NamesIn = Callable[[Path], Collection[str]]


class Names:
    """Names below `root`. `scratch` is a folder on the same file system, where names are tried out once it is there."""

    def __init__(self, root: Path, scratch: Path, names_in: NamesIn = os.listdir) -> None:
        self._root, self._scratch = root, scratch
        self._names_in = names_in
        self._kept: bool | None = None

    def same(self, key: str) -> bool:
        """False where a part of `key` leads to a file or folder of another name. Raises OSError."""
        return self._are_kept() or spelled(self._root, key, self._names_in)

    def _are_kept(self) -> bool:
        if self._kept is None and self._scratch.is_dir() and os.access(self._scratch, os.W_OK):
            self._kept = self._tried()
        return self._kept is not False  # nothing was written here yet, or nothing can be

    def _tried(self) -> bool:
        name = uuid4().hex + PROBE
        path = self._scratch / name
        twins = [unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name), name.upper()]
        try:
            path.touch(exist_ok=False)
            kept = name in self._names_in(self._scratch)
            twice = any((self._scratch / twin).exists() for twin in twins)
            path.unlink()
        except OSError:
            return False  # not even this name: each one is looked at
        return kept and not twice


def spelled(root: Path, key: str, names_in: NamesIn) -> bool:
    """Whether each part of `key` that is there is held by its folder in exactly this spelling."""
    folder = root
    for segment in key.split("/"):
        try:
            names = names_in(folder)
        except ABSENT:
            return True
        if segment not in names:
            return not os.path.lexists(folder / segment)
        folder = folder / segment
    return True
