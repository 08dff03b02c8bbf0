"""Listing of an object directory, and whether its file system keeps names as they are given."""

import logging
import os
import stat
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from uuid import uuid4

from app.core.errors import Rejected
from app.object_store.port import CONTROL, MAX_KEY_BYTES, ObjectInfo, check_characters

# The listing of an object directory: every file that a key can name, in the order of S3.
#
# Invariants: no symbolic link is followed; what a key cannot name is left out and told; one folder's names are in
# memory at a time.

ABSENT = (FileNotFoundError, NotADirectoryError)
log = logging.getLogger(__name__)

InfoOf = Callable[[str, os.stat_result], ObjectInfo]
Translated = Callable[[str], AbstractContextManager[None]]


class Listing:
    """Of all below `root`, but for the folder `hidden` in it."""

    def __init__(self, root: Path, hidden: str, info_of: InfoOf, translated: Translated) -> None:
        self._root = str(root)
        self._hidden = hidden
        self._info_of = info_of
        self._translated = translated

    def below(self, prefix: str) -> Iterator[ObjectInfo]:
        """Depth first."""
        folder = prefix.rpartition("/")[0]
        if self._can_name_folder(prefix, folder):
            start = f"{self._root}/{folder}" if folder else self._root
            if os.path.realpath(start) == start:
                yield from self._walk(f"{folder}/" if folder else "", prefix)

    def has(self, key: str) -> bool:
        """Whether a listing holds exactly this key. It comes before all others that begin with it."""
        return next((info.key for info in self.below(key)), None) == key

    def _can_name_folder(self, prefix: str, folder: str) -> bool:
        """False for prefixes that no key starts with; they must not be turned into a path."""
        segments = folder.split("/") if folder else []
        if any(segment in ("", ".", "..") for segment in segments) or self._hidden in segments[:1]:
            return False
        if prefix.startswith("/"):
            return False
        return CONTROL.isdisjoint(prefix) and prefix.encode("utf-8", "replace").decode() == prefix

    def _walk(self, base: str, prefix: str) -> Iterator[ObjectInfo]:
        for key in self._names(base):
            if key.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key, prefix)
            elif key.startswith(prefix):
                found = self._stat(key)
                if found is not None:
                    yield self._info_of(key, found)

    def _stat(self, key: str) -> os.stat_result | None:
        try:
            found = os.lstat(f"{self._root}/{key}")
        except ABSENT:
            return None
        except OSError:
            with self._translated(key):
                raise
        return found if stat.S_ISREG(found.st_mode) else None

    def _names(self, base: str) -> Sequence[str]:
        """Files and folders directly below `base`, folders with a slash at the end, which is what sorts them right:
        `a-b` comes before all of `a/`. Text sorts by code point, and so does UTF-8.
        """
        names = []
        with self._translated(base):
            try:
                with os.scandir(f"{self._root}/{base}") as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            names.append(f"{base}{entry.name}/")
                        elif entry.is_file(follow_symlinks=False):
                            names.append(base + entry.name)
            except ABSENT:
                return ()  # removed since its parent was read
        return sorted(name for name in names if self._is_key(name.removesuffix("/")))

    def _is_key(self, name: str) -> bool:
        """Whether a file that somebody put here can be named by a key at all, be it one that no new object may have. A
        name that the file system gave has no empty or dot segments, so that usual ones need no closer look.
        """
        if name == self._hidden:
            return False
        if name.isascii() and name.isprintable() and len(name) <= MAX_KEY_BYTES:
            return True
        try:
            check_characters(name)
        except Rejected as error:
            log.warning("left out of a listing: %s", error)
            return False
        return True


# Whether a file system keeps names as they are given: some ignore case, some rewrite Unicode or drop a last dot.
#
# Invariant: where names are kept, as on nearly every server, a look costs nothing; elsewhere each segment is
# compared with the names that its folder really holds.

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
