"""Where everything of one inbox lies, and which files wait in it."""

import errno
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO

from app.core.errors import AppError, Permanent, Transient
from app.core.files import NAME_BYTES, TEMPORARY_SUFFIX, bounded_name, sync_file
from app.core.runs import Context
from app.csv_inbox.config import NO_ACCESS, NOT_REGULAR, Fault, InboxConfig, Stuck, Unmergeable, Unsteady

# Where everything of one inbox lies, and what an operating system's error about it asks of the caller.
#
# Invariants: all that belongs to one master begins with its name and lies in its folder, so several masters can share
# one; temporary files can be told by their names, so a restart can remove them; no name that is made here is longer
# than a directory can hold, whatever it is made of.

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


# One run of the inbox: what its parts share.
#
# Invariant: what is told to the person who runs it by hand also stands in the inbox's log.

MEBIBYTE = 1 << 20
UNIT = "records"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """One run. `progress` counts MiB."""

    places: Places
    context: Context
    clock: Callable[[], datetime]
    told: list[str] = field(default_factory=list)

    @property
    def config(self) -> InboxConfig:
        """The configuration."""
        return self.places.config

    def tell(self, line: str) -> None:
        """Say it to whoever ran it, and in the log."""
        self.told.append(line)
        log.info("%s", line)

    def beat(self, master: Path | None) -> Callable[[int], None]:
        """Counts bytes as MiB, and is a safe point: until the commit a merge can be given up."""
        self.context.progress.advance(total=master.stat().st_size // MEBIBYTE if master else 0)
        passed = 0

        def beat(size: int) -> None:
            nonlocal passed
            self.context.stop.check()
            before, passed = passed, passed + size
            if passed // MEBIBYTE > before // MEBIBYTE:
                self.context.progress.advance(done=passed // MEBIBYTE - before // MEBIBYTE)

        return beat


# Which file a name leads to, and in which state it is.
#
# Invariant: nothing but a regular file is ever opened for good, and no link is followed.

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Identity:
    """Which file this is, and in which state. Equal identities: nothing was written to it in between."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def identity_of(found: os.stat_result) -> Identity:
    """The identity in an answer of stat."""
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def open_regular(path: Path) -> IO[bytes]:
    """The file, if it is one: links are not followed, devices and pipes not opened for good. Raises Unmergeable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Unsteady(f"{path.name} is gone", "no action needed; whoever put it there took it away") from error
    except OSError as error:
        fault = Fault(f"it cannot be opened: {error.strerror}")
        raise Unmergeable([fault], "put a readable, regular file", kind=NO_ACCESS) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        hint = "put the file itself into the inbox, not a pipe or a device"
        raise Unmergeable([Fault("it is no regular file")], hint, kind=NOT_REGULAR)
    return os.fdopen(descriptor, "rb", buffering=0)


def read_some(file: IO[bytes], size: int) -> bytes:
    """What the file has next. Raises Stuck where its device does not give it: other files are none the worse."""
    try:
        return file.read(size)
    except OSError as error:
        told = f"it cannot be read: {error.strerror}"
        raise Stuck(told, "look at the disk that it lies on; it stays in the inbox, and others go on") from error


def md5_of(file: IO[bytes], size_bytes: int) -> str:
    """The MD5 of the first bytes of the file, which is read up to there; "" when it is shorter. Raises Stuck."""
    digest = hashlib.md5(usedforsecurity=False)
    file.seek(0)
    while size_bytes > 0 and (piece := read_some(file, min(size_bytes, PIECE_BYTES))):
        digest.update(piece)
        size_bytes -= len(piece)
    return digest.hexdigest() if not size_bytes else ""


# What lies in the inbox: which files are candidates, in which order, and whether they are still being written.
#
# Invariant: a file is taken only when size, modification time and MD5 stayed the same over the waiting time; links,
# pipes and devices are never opened.

SUFFIX = ".csv"
CHUNK_BYTES = MEGABYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Candidate:
    """A name in the inbox that ends in .csv. `refused` says why it can never be merged, empty when it may be.

    `md5` is that of before the waiting time, "" when it was not taken.
    """

    path: Path
    identity: Identity
    refused: str = ""
    md5: str = ""


def candidates(config: InboxConfig) -> Sequence[Candidate]:
    """Oldest first by modification time, then by name; hidden names are left alone. Raises OSError."""
    try:
        entries = [Path(entry.path) for entry in os.scandir(config.watch_dir) if _named(entry.name)]
    except FileNotFoundError:
        return []
    found = [each for each in map(candidate, entries) if each is not None and each.path != config.merged_file]
    return in_order(found)


def in_order(found: Sequence[Candidate]) -> Sequence[Candidate]:
    """Oldest first by modification time, then by name."""
    return sorted(found, key=lambda each: (each.identity.mtime_ns, each.path.name))


def _named(name: str) -> bool:
    return name.lower().endswith(SUFFIX) and not name.startswith(".")


def candidate(path: Path) -> Candidate | None:
    """What has this name; None for a folder and for what is gone by now."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        return None
    refused = ""
    if stat.S_ISLNK(found.st_mode):
        refused = "it is a symbolic link"
    elif not stat.S_ISREG(found.st_mode):
        refused = "it is no regular file"
    return Candidate(path, identity_of(found), refused)


def is_too_large(size_bytes: int, config: InboxConfig) -> bool:
    """Above what the configuration allows."""
    return size_bytes > config.max_file_size_mb * MEGABYTE


def unchanged(before: Candidate) -> bool:
    """True while the name leads to the same file in the same state."""
    try:
        return identity_of(before.path.lstat()) == before.identity
    except FileNotFoundError:
        return False


def fingerprint(candidate: Candidate) -> str:
    """The MD5 of the file now. Raises Unmergeable (cannot be opened), Unsteady (gone) and Stuck (cannot be read)."""
    with open_regular(candidate.path) as file:
        digest = hashlib.md5(usedforsecurity=False)
        while piece := read_some(file, CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def check_steady(candidate: Candidate, now: str) -> None:
    """Raises Unsteady when the MD5 is not what it was before the waiting time."""
    if candidate.md5 and candidate.md5 != now:
        raise Unsteady(f"{candidate.path.name} changed under its name", "no action needed; the next run looks again")


def refusal(candidate: Candidate) -> Unmergeable:
    """Why the candidate can never be merged."""
    hint = "put the file itself into the inbox, not a link, a pipe or a device"
    return Unmergeable([Fault(candidate.refused)], hint, kind=NOT_REGULAR)
