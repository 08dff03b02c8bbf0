"""The paths of one inbox, the files that wait in it, and how a file is opened and recognised again."""

import errno
import hashlib
import itertools
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, NamedTuple

from app.core.errors import AppError, Permanent, Transient
from app.core.files import NAME_BYTES, TEMPORARY_SUFFIX, bounded_name, sync_file
from app.core.runs import Context
from app.csv_inbox.config import (
    FaultKind,
    FileFault,
    FileStillChanging,
    InboxConfig,
    StuckFile,
    UnmergeableFile,
    printable,
)

MEBIBYTE = 1 << 20
UNIT = "records"
SUFFIX = ".csv"
NAMED_FILES = 5
PENDING = ".pending-"
REASON, BAD_ROWS, RECORD = ".reason.json", ".bad_rows.csv", ".json"
WRITTEN_BYTES = 38
"""Bytes that `write_durably` adds to a name."""
STEM_BYTES = NAME_BYTES - WRITTEN_BYTES - len("..merge-journal.json")
"""How much of the master's name goes into the names beside it: short enough for the longest addition."""
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
NEVER_OPENED = (*REFUSED, errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""No rights, a link, a socket, a device without a driver."""
NOT_REGULAR = "put the file itself into the inbox, not a link, a pipe or a device"
log = logging.getLogger(__name__)


class InboxPaths:
    """The paths of one inbox. Several masters can share a folder: each one's files begin with its name.

    A restart recognises temporary files by their names and removes them. No name exceeds the file system's limit.
    """

    def __init__(self, config: InboxConfig) -> None:
        master = config.merged_file
        self.config = config
        self.folder = master.parent
        # Only one process at a time; the kernel releases the lock when its holder dies.
        self.lock = master.with_name(bounded_name(master.name, ".lock"))
        self._prefix = f".{bounded_name(master.name, limit_bytes=STEM_BYTES)}."
        # The committed transaction, until it is carried out.
        self.journal = master.with_name(f"{self._prefix}merge-journal.json")
        # The load history and the undo files.
        self.loads = master.with_name(f"{self._prefix}loads")
        # The key index of a large master; without it the next merge takes longer.
        self.index = master.with_name(f"{self._prefix}index")

    def temporary(self, load_id: str, what: str, folder: Path | None = None) -> Path:
        """A hidden temporary file of one merge, in the master's folder unless another one is given."""
        return (folder or self.folder) / f"{self._prefix}{load_id}.{what}.merge{TEMPORARY_SUFFIX}"

    def leftovers(self) -> Sequence[Path]:
        """Temporary files and pending links of a merge that was never committed. Raises OSError."""
        config, end = self.config, re.escape(TEMPORARY_SUFFIX)
        kinds = (
            (rf"\.?{re.escape(self._prefix)}.*{end}", {self.folder, config.metadata_file.parent, config.watch_dir}),
            # Reasons, bad rows and records whose `write_durably` was killed.
            (rf"\..*({re.escape(REASON)}|{re.escape(BAD_ROWS)}).*{end}", {config.rejected_dir}),
            (rf"\..*{re.escape(RECORD)}.*{end}", {self.loads}),
            (rf"{re.escape(PENDING)}.*", {config.archive_dir}),
        )
        listed = (
            (re.compile(name, re.DOTALL), path) for name, folders in kinds for each in folders for path in _listed(each)
        )
        return [path for name, path in listed if name.fullmatch(path.name)]

    def make(self) -> None:
        """Create every folder. Raises OSError."""
        config = self.config
        given = (config.watch_dir, config.archive_dir, config.rejected_dir, config.metadata_file.parent)
        for folder in (*given, self.folder, self.loads):
            folder.mkdir(parents=True, exist_ok=True)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def time_stamp(at: datetime) -> str:
    """A UTC timestamp as `YYYYMMDDTHHMMSS.mmm`."""
    return f"{at:%Y%m%dT%H%M%S}.{at.microsecond // 1000:03d}"


def free_paths(folder: Path, name: str, suffix: str, *, end: str = "", limit_bytes: int = NAME_BYTES) -> Iterator[Path]:
    """Paths that do not exist yet, so nothing is overwritten: name, suffix and end, then with .1, .2, ... between."""
    for number in itertools.count():
        path = folder / bounded_name(name, f"{suffix}{f'.{number}' if number else ''}{end}", limit_bytes)
        if not os.path.lexists(path):
            yield path


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link the file; make a durable copy on another file system or where links are not supported."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        copy_durably(source, target)


def copy_durably(source: Path, target: Path) -> None:
    """Copy a regular file with its times."""
    shutil.copy2(source, target, follow_symlinks=False)
    with target.open("rb") as file:
        sync_file(file.fileno())


@contextmanager
def translate_os_errors(doing: str) -> Iterator[None]:
    """Translate OSErrors of the block: Transient for a full disk, Permanent for what needs a person.

    The message names the path in the OSError (the target of a move), or `doing` if it has none: a disk that fills up
    during a write names none, so an inner block gives its folder.
    """
    try:
        yield
    except AppError:
        raise
    except OSError as error:
        named = error.filename2 or error.filename
        what = f"{printable(os.fsdecode(named) if named else doing)}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Transient(what, "free space there; nothing was lost, and the next run continues") from error
        if error.errno in REFUSED:
            raise Permanent(what, "let this user write there; nothing was lost, and the next run continues") from error
        hint = "look at the disk and the system's log; nothing was changed that is not complete"
        raise Permanent(what, hint) from error


@dataclass(frozen=True, slots=True)
class InboxRun:
    """What the parts of one run share. Progress counts MiB; `told` becomes the notes of the run's report."""

    paths: InboxPaths
    context: Context
    clock: Callable[[], datetime]
    told: list[str] = field(default_factory=list)

    @property
    def config(self) -> InboxConfig:
        """The configuration."""
        return self.paths.config

    def tell(self, line: str, level: int = logging.INFO) -> None:
        """Add a line to the report's notes and to the log."""
        self.told.append(line)
        log.log(level, "%s", line)

    def beat(self, size_bytes: int) -> Callable[[int], None]:
        """A callback that counts bytes as MiB and checks for a stop: a merge can be aborted until its commit.

        `size_bytes` more are expected.
        """
        self.context.progress.advance(total=size_bytes // MEBIBYTE)
        rest = 0

        def beat(size: int) -> None:
            nonlocal rest
            self.context.stop.check()
            done, rest = divmod(rest + size, MEBIBYTE)
            if done:
                self.context.progress.advance(done=done)

        return beat


class FileIdentity(NamedTuple):
    """Identifies a file and its state. Equal identities mean that nothing was written to it in between."""

    device: int
    inode: int
    size: int
    mtime_ns: int


UNKNOWN_FILE = FileIdentity(0, 0, 0, 0)


def identity_of(found: os.stat_result) -> FileIdentity:
    """The identity in a stat result."""
    return FileIdentity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def identity_at(path: Path) -> FileIdentity | None:
    """The identity of the file at this path, without following links; None if there is none."""
    try:
        return identity_of(path.lstat())
    except FileNotFoundError:
        return None


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file without following links.

    Raises UnmergeableFile for anything else, FileStillChanging, and StuckFile for what may pass, such as too many open
    files.
    """
    try:
        # O_NONBLOCK: opening a pipe would wait for its writer, perhaps forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise FileStillChanging("it is gone") from error
    except OSError as error:
        told = f"it cannot be opened: {error.strerror}"
        if error.errno not in NEVER_OPENED:
            raise StuckFile(told, "look at the system's log; it stays in the inbox, and others go on") from error
        raise UnmergeableFile(FaultKind.NO_ACCESS, [FileFault(told)], "put a readable, regular file") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnmergeableFile(FaultKind.NOT_REGULAR, [FileFault("not a regular file")], NOT_REGULAR)
    return os.fdopen(descriptor, "rb", buffering=0)


def read_some(file: IO[bytes], size: int) -> bytes:
    """Read the next bytes. Raises StuckFile on an I/O error, so that other files are still processed."""
    try:
        return file.read(size)
    except OSError as error:
        told = f"it cannot be read: {error.strerror}"
        raise StuckFile(told, "look at the disk that it lies on; it stays in the inbox, and others go on") from error


def md5_of(file: IO[bytes], size_bytes: int) -> str:
    """The MD5 of the first `size_bytes` bytes; "" if the file is shorter. Moves the file position. Raises StuckFile."""
    digest = hashlib.md5(usedforsecurity=False)
    file.seek(0)
    while size_bytes > 0 and (piece := read_some(file, min(size_bytes, MEBIBYTE))):
        digest.update(piece)
        size_bytes -= len(piece)
    return digest.hexdigest() if not size_bytes else ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A .csv name in the inbox. `refused` is why it can never be merged, or "" if it may be.

    `md5` was computed before the wait; "" if it was not computed.
    """

    path: Path
    identity: FileIdentity
    refused: str = ""
    md5: str = ""

    @property
    def name(self) -> str:
        """Its name as one line of text."""
        return printable(self.path.name)

    def is_unchanged(self) -> bool:
        """True while the path is the same file in the same state."""
        return identity_at(self.path) == self.identity


def waiting_files(paths: InboxPaths) -> tuple[Sequence[Candidate], str]:
    """The .csv files in the inbox, in no order, and a note on files that are ignored because of their names, or "".

    Hidden names, folders and the inbox's own files are neither. Raises OSError.
    """
    config = paths.config
    own = {config.merged_file, config.metadata_file, config.log_file, paths.lock}
    found, others = [], []
    for path in _listed(config.watch_dir):
        if path.name[0] == "." or path in own:
            continue
        with suppress(FileNotFoundError):  # gone by now
            status = path.lstat()
            if not path.name.lower().endswith(SUFFIX):
                others += [] if path.is_dir() else [printable(path.name)]
            elif not stat.S_ISDIR(status.st_mode):
                link = "it is a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
                found.append(Candidate(path, identity_of(status), "" if stat.S_ISREG(status.st_mode) else link))
    if not others:
        return found, ""
    named = ", ".join(sorted(others)[:NAMED_FILES]) + (", ..." if others[NAMED_FILES:] else "")
    return found, f"{len(others)} files in the inbox are ignored, since their names do not end in {SUFFIX}: {named}"


def check_can_be_taken(each: Candidate) -> None:
    """Raises UnmergeableFile for what is no regular file, and StuckFile for what this user may not move out of its
    folder; in a sticky folder the user must own it.

    Otherwise such a file would be merged and then fail every run at the same step, ahead of all other files.
    """
    if each.refused:
        raise UnmergeableFile(FaultKind.NOT_REGULAR, [FileFault(each.refused)], NOT_REGULAR)
    parent = each.path.parent
    folder, user, may = parent.stat(), os.geteuid(), os.access(parent, os.W_OK | os.X_OK)
    if may and folder.st_mode & stat.S_ISVTX and user not in (0, folder.st_uid):
        with suppress(FileNotFoundError):  # reported when the file is opened
            may = each.path.lstat().st_uid == user
    if not may:
        hint = f"let this user write to {parent}, or remove the file"
        raise StuckFile("this user may not remove it from the inbox", hint)
