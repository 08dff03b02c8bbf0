"""What code does to a disk, in order: files and directories flushed, names given and taken away.

Nothing is put in the place of anything: Python tells an audit hook of names, and a profiler of calls of fsync. An fsync
fails when the profiler raises, as one of a broken disk would.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

NAMED = {"os.rename": "rename", "os.link": "link", "os.remove": "remove"}


class Effect(NamedTuple):
    """`what` is flush, fail (a flush that did), rename, link or remove; `size_bytes`: of a file at that moment."""

    what: str
    path: Path
    target: Path
    size_bytes: int


class Disk:
    """The effects of this thread below `folder` while they are `recorded`.

    `broken` is asked whether the fsync of a path fails; `before` is told of each name before it is given or taken away.
    """

    def __init__(
        self,
        folder: Path,
        broken: Callable[[Path], bool] = lambda _: False,
        before: Callable[[Effect], None] = lambda _: None,
    ) -> None:
        self._folder, self._broken, self._before = folder.resolve(), broken, before
        self.effects: list[Effect] = []

    def paths(self, what: str) -> list[Path]:
        return [each.path for each in self.effects if each.what == what]

    def renamed_unflushed(self) -> list[Path]:
        """Files that got their name while some of their bytes were not on the disk."""
        flushed: dict[Path, int] = {}
        found = []
        for what, path, target, size_bytes in self.effects:
            if what == "flush":
                flushed[path] = size_bytes
            elif what == "rename":
                if flushed.get(path) != size_bytes:
                    found.append(target)
                flushed[target] = flushed.get(path, -1)
            elif what == "link":
                flushed[target] = flushed.get(path, -1)
        return found

    def unflushed_names(self) -> list[Path]:
        """Names that were given and whose directory was not flushed since: a power cut may take them back."""
        found: list[Path] = []
        for what, path, target, _ in self.effects:
            if what == "flush":
                found = [each for each in found if each.parent != path]
            elif what in ("rename", "link"):
                found = [each for each in found if each != path] + [target]
            elif path in found:
                found.remove(path)
        return found

    def see(self, what: str, *paths: Any) -> None:
        named = [Path(os.path.realpath(os.fsdecode(each))) for each in paths if isinstance(each, str | os.PathLike)]
        if not named[0].is_relative_to(self._folder):
            return
        size_bytes = named[0].stat().st_size if named[0].is_file() else 0
        self.effects.append(Effect(what, named[0], named[-1], size_bytes))
        if what in NAMED.values():
            self._before(self.effects[-1])

    def _called(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function is os.fsync:
            # Whoever calls fsync calls its argument so.
            path = Path(f"/proc/self/fd/{frame.f_locals['descriptor']}").readlink()
            is_broken = self._broken(path)
            self.see("fail" if is_broken else "flush", path)
            if is_broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    @contextmanager
    def recorded(self) -> Iterator[None]:
        WATCHING.append(self)
        sys.setprofile(self._called)
        try:
            yield
        finally:
            sys.setprofile(None)
            WATCHING.remove(self)


WATCHING: list[Disk] = []


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHING and event in NAMED:
        WATCHING[-1].see(NAMED[event], *arguments)


sys.addaudithook(_heard)  # there is no way to take one away
