"""Where everything of one inbox lies, and what an operating system's error about it asks of the caller.

Invariants: all that belongs to one master begins with its name and lies in its folder, so several masters can share
one; temporary files can be told by their names, so a restart can remove them; no name that is made here is longer than
a directory can hold, whatever it is made of.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from app.core.errors import AppError, Permanent, Transient
from app.core.files import NAME_BYTES, TEMPORARY_SUFFIX, bounded_name, sync_file
from app.csv_inbox.config import InboxConfig

PENDING = ".pending-"
TEMPORARY = ".merge.tmp"
REASON, BAD_ROWS, RECORD = ".reason.json", ".bad_rows.csv", ".json"
WRITTEN_BYTES = 38
"""What `write_durably` puts around a name."""
STEM_BYTES = NAME_BYTES - WRITTEN_BYTES - len("..merge-journal.json")
"""What of the master's name is in the names beside it; with the longest of what is put around it, it fits."""
REJECTED_BYTES = NAME_BYTES - WRITTEN_BYTES - len(BAD_ROWS)
"""What the name of a rejected file may have, so that its reason and its bad rows can be named after it."""
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, slots=True)
class Places:
    """The files beside the master."""

    config: InboxConfig

    @property
    def folder(self) -> Path:
        """The master's folder."""
        return self.config.merged_file.parent

    @property
    def lock(self) -> Path:
        """What keeps two processes apart; the kernel releases it when its holder dies."""
        return self.config.merged_file.with_name(bounded_name(self.config.merged_file.name, ".lock"))

    @property
    def journal(self) -> Path:
        """What was committed and may not be carried out yet."""
        return self._beside("merge-journal.json")

    @property
    def loads(self) -> Path:
        """The folder of the load history, and of what it takes to undo."""
        return self._beside("loads")

    @property
    def index(self) -> Path:
        """The index of a large master; without it the next merge takes longer."""
        return self._beside("index")

    def temporary(self, load_id: str, what: str) -> Path:
        """A temporary file of one merge."""
        return self._beside(f"{load_id}.{what}{TEMPORARY}")

    def temporary_metadata(self, load_id: str) -> Path:
        """The same beside the metadata, which may lie in another folder."""
        return self.config.metadata_file.with_name(self.temporary(load_id, "metadata").name)

    def temporary_tail(self, load_id: str) -> Path:
        """The same in the inbox, hidden there: a file that is made of what was written to another one too late."""
        return self.config.watch_dir / self.temporary(load_id, "tail").name

    def pending(self, load_id: str) -> Path:
        """The archive's hold on an input before the commit."""
        return self.config.archive_dir / f"{PENDING}{load_id}"

    def leftovers(self) -> list[Path]:
        """Temporary files and pending links of a merge that was never committed."""
        config = self.config
        own = f".{self._stem}."
        folders = {self.folder, config.metadata_file.parent, config.watch_dir}
        found = [path for folder in folders for path in _listed(folder) if path.name.startswith((own, f".{own}"))]
        found += [path for path in (*_listed(self.loads), *_listed(config.rejected_dir)) if _half_written(path)]
        found = [path for path in found if path.name.endswith(TEMPORARY_SUFFIX)]
        return [*found, *(path for path in _listed(config.archive_dir) if path.name.startswith(PENDING))]

    def make(self) -> None:
        """Create every folder. Raises OSError."""
        config = self.config
        for folder in (config.watch_dir, config.archive_dir, config.rejected_dir, self.folder, self.loads):
            folder.mkdir(parents=True, exist_ok=True)
        config.metadata_file.parent.mkdir(parents=True, exist_ok=True)

    @property
    def _stem(self) -> str:
        return bounded_name(self.config.merged_file.name, limit_bytes=STEM_BYTES)

    def _beside(self, what: str) -> Path:
        return self.config.merged_file.with_name(f".{self._stem}.{what}")


def _half_written(path: Path) -> bool:
    """A reason, its rows or a record that `write_durably` was killed over."""
    return path.name.startswith(".") and any(kind in path.name for kind in (REASON, BAD_ROWS, RECORD))


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def stamp(at: datetime) -> str:
    """`YYYYMMDDTHHMMSS.mmm` of an instant in UTC."""
    return f"{at:%Y%m%dT%H%M%S}.{at.microsecond // 1000:03d}"


def unused(folder: Path, name: str, at: datetime) -> Path:
    """`{name}.{stamp}` in the folder, with a number behind it should that name be taken: nothing is overwritten."""
    number = 0
    while True:
        wanted = folder / bounded_name(name, f".{stamp(at)}" + (f".{number}" if number else ""))
        if not os.path.lexists(wanted):
            return wanted
        number += 1


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the file; a durable copy where the file system has no second names or is another one."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        shutil.copy2(source, target, follow_symlinks=False)
        with target.open("rb") as file:
            sync_file(file.fileno())


@contextmanager
def placed(folder: Path) -> Iterator[None]:
    """OSErrors of the block name this folder where the system named no path, as when a disk is full in mid-write."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(folder)
        raise


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """OSErrors of the block as ours: what passes by itself, what needs a person.

    The message names the path that the system named, where it was to go if it was moved; `doing` where it named none.
    """
    try:
        yield
    except AppError:
        raise
    except OSError as error:
        named = error.filename2 or error.filename
        what = f"{printable(os.fsdecode(named)) if named else doing}: {error.strerror or error}"
        if error.errno in FULL:
            raise Transient(what, "free space there; nothing was lost, and the next run goes on") from error
        if error.errno in REFUSED:
            raise Permanent(what, "let this user write there; nothing was lost, and the next run goes on") from error
        raise Permanent(
            what, "look at the disk and the system's log; nothing was changed that is not complete"
        ) from error


def printable(name: str) -> str:
    """A file name as one line of clean text, whatever bytes it is made of."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
