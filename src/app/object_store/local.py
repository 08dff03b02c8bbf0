"""The object store port on a directory of this machine: a key is a path below the root."""

import errno
import fcntl
import hashlib
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from shutil import copyfileobj
from typing import Any, BinaryIO
from uuid import uuid4

from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient
from app.core.files import replace_durably, sync_directory, sync_file
from app.object_store.local_listing import ABSENT, Listing, Names
from app.object_store.port import BadKey, ListingBatch, ObjectInfo, Put, check_key, in_batches, is_new_form

# Content type and metadata of an object, which a plain file has no place for.
#
# Kept as an extended attribute of the file itself, so that both appear with one rename; where the file system has
# none, or the note is too long for one, in a file below `folder` named by the key's SHA-256: a name built from the
# key itself could be too long, or stand where another key needs a folder. Invariant: a note names the ETag that it
# belongs to and counts for no other, so a crash or a change by another program loses metadata and never gives an
# object another's.

ATTRIBUTE = "user.headwater"
UNABLE = {errno.ENOTSUP, errno.ENOSPC, errno.E2BIG, errno.ERANGE, errno.EPERM}


class Notes:
    """The notes of one directory; half-written ones are in `temporaries`. All methods may raise OSError."""

    def __init__(self, folder: Path, temporaries: Path) -> None:
        self._folder = folder
        self._temporaries = temporaries

    def attach(self, descriptor: int, etag: str, put: Put) -> bool:
        """Keep the note with the open file, durable with its next fsync; False where that cannot be done."""
        if sys.platform != "linux":
            return False
        try:
            os.setxattr(descriptor, ATTRIBUTE, _text(etag, put))
        except OSError as error:
            if error.errno in UNABLE:
                return False
            raise
        return True

    def write(self, key: str, etag: str, put: Put) -> None:
        """Keep the note in a file of its own, before the object that has this ETag gets its name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._temporaries / uuid4().hex
        try:
            with temporary.open("xb") as file:
                file.write(_text(etag, put))
                file.flush()
                sync_file(file.fileno())
            replace_durably(temporary, self._path(key))
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, key: str, path: Path, info: ObjectInfo) -> tuple[ObjectInfo, bool]:
        """`info` with what is noted of it, and whether that is certain: it is not while a writer may stand between the
        note of the next version and its rename.
        """
        attached = _attached(path)
        found = _parsed(self._read_file(key) if attached is None else attached)
        if found is None:
            return info, True
        if found.get("etag") != info.etag:
            return info, attached is not None
        return replace(info, content_type=found["content_type"], metadata=found["metadata"]), True

    def remove(self, key: str) -> None:
        """Forget the note of a deleted object."""
        self._path(key).unlink(missing_ok=True)

    def _read_file(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return b""

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _text(etag: str, put: Put) -> bytes:
    metadata = {name.lower(): value for name, value in put.metadata.items()}
    return json.dumps({"etag": etag, "content_type": put.content_type, "metadata": metadata}).encode()


def _attached(path: Path) -> bytes | None:
    """The note inside the file's attributes; None when there is none."""
    if sys.platform != "linux":
        return None
    try:
        return os.getxattr(path, ATTRIBUTE, follow_symlinks=False)
    except OSError:
        return None  # no attribute, no support, or the file is gone, which its caller sees as well


def _parsed(note: bytes) -> dict[str, Any] | None:
    """None for no note, or for one that a power cut tore."""
    try:
        found = json.loads(note)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


# The object store port on a directory of this machine: a key is a path below the root, readable by any other
# program.
#
# Invariants: a name holds the whole old object or the whole new one, also after a kill or a power cut; check and
# rename happen under one lock of all threads and processes, which is never held while a body is streamed; no
# symbolic link below the root is followed. What has no place in a plain file is kept below `.headwater/`, which is
# never part of a listing:
#
#     lock      taken around check and rename
#     tmp/      objects that are still being written; leftovers of killed processes go with the next `probe`
#     meta/     content type and metadata of objects that cannot carry them themselves, see above

HIDDEN = ".headwater"
LOCK_SECONDS = 30
POLL_SECONDS = 0.005
LEFTOVER_NS = 24 * 3600 * 10**9
CHUNK_BYTES = 1 << 20
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Another disk, a file of another user (fs.protected_hardlinks), a folder, a file system without links, too many.
UNLINKABLE = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A temporary file as it will be under its name. `noted`: it carries its own note."""

    etag: str
    modified_at_ns: int
    noted: bool


class LocalDirectory:
    """Objects below `root`, which is made on the first write. `clock_ns` gives nanoseconds since the epoch.

    An ETag is inode, modification time and size of the file: it needs no store of its own, and a change by another
    program is seen. Each write is a new file with a later time than the one it replaces, so that it never comes back.
    Reading a key that is a folder, or below a file, finds nothing; writing it is Rejected.
    """

    def __init__(self, root: Path, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._root = Path(os.path.realpath(root))
        self._hidden = self._root / HIDDEN
        self._notes = Notes(self._hidden / "meta", self._hidden / "tmp")
        self._listing = Listing(self._root, HIDDEN, _info, _translated)
        self._names = Names(self._root, self._hidden / "tmp")
        self._clock_ns = clock_ns
        self._turn = threading.Lock()
        self._probed = False

    @property
    def conditional(self) -> bool:
        """True once `probe` has seen that the root can be written and locked."""
        return self._probed

    def probe(self) -> None:
        """Write and lock below the root, and remove what killed processes left there more than a day ago."""
        with _translated(str(self._root)):
            with self._spooled([b"probe"], Put("text/plain")), self._locked():
                oldest_ns = self._clock_ns() - LEFTOVER_NS
            for leftover in (self._hidden / "tmp").iterdir():
                found = _stat(leftover)
                if found is not None and found.st_mtime_ns < oldest_ns:
                    leftover.unlink(missing_ok=True)
        self._probed = True

    def head(self, key: str) -> ObjectInfo | None:
        """Properties, with the metadata unless the file was changed by another program."""
        path = self._held_path(key)
        if path is None:
            return None
        with _translated(key):
            info, certain = self._look(key, path)
            if not certain:  # a writer may stand between the note and the rename: look when there is none
                with self._locked():
                    info, _ = self._look(key, path)
            return info

    def put(self, key: str, body: BinaryIO, put: Put) -> str:
        """Stream to a temporary file, then check and rename under the lock. Durable when it returns."""
        path = self._path(check_key(key))
        chunks = iter(partial(body.read, CHUNK_BYTES), b"")
        with _translated(key), self._spooled(chunks, put) as (spooled, first), self._locked():
            sealed = first
            self._check_name(key)
            held = _stat(path)
            _check_expected(key, put.expected, held)
            if held is not None and sealed.modified_at_ns <= held.st_mtime_ns:
                # Made newer than what it replaces, also when the clock was set back: the inode may have belonged to an
                # earlier version, so the time alone tells them apart. Inode, time and size outlive the rename.
                with spooled.open("rb+") as file:
                    sealed = self._seal(file, held.st_mtime_ns + 1, put)
            etag = sealed.etag
            try:
                _make_folder(path.parent)
                if not sealed.noted:
                    self._notes.write(key, etag, put)
                if path.is_dir():
                    path.rmdir()  # an empty one was left by a killed writer; any other is another key's folder
                replace_durably(spooled, path)
            except OSError:
                self._prune(path.parent)
                raise
            self._check_name(key, written=path)
            return etag

    @contextmanager
    def open(self, key: str, etag: str | None = None) -> Iterator[BinaryIO | None]:
        """The file itself: it keeps its bytes for this reader when it is replaced or deleted meanwhile."""
        path = self._held_path(key)
        with _translated(key):
            file = None if path is None else _open(path)
        if file is None:
            yield None
            return
        with file:
            if etag is not None and etag != _etag(os.fstat(file.fileno())):
                raise Conflict(f"{key}: is no longer the version {etag}", "nothing to do: it is read again")
            yield file

    def pin(self, key: str, target: Path) -> str | None:
        """A second name for the version that is there, which stays as it is when the key is replaced or deleted; a copy
        where there can be no second name. The version's ETag, None when there is no object.
        """
        path = self._held_path(key)
        if path is None:
            return None
        with _translated(key):
            try:
                target.hardlink_to(path)
            except ABSENT:
                return None
            except OSError as error:
                if error.errno not in UNLINKABLE:
                    raise
                return _copied(path, target)
            found = _stat(target)
            if found is None:
                target.unlink()
            return None if found is None else _etag(found)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Depth first, one folder's names in memory at a time."""
        return self._listing.below(prefix)

    def batches(self, prefix: str, objects: int) -> Iterator[ListingBatch]:
        """As listed: each file is looked at."""
        del objects
        return in_batches(self.list(prefix))

    def delete(self, key: str) -> None:
        """Remove the file, its metadata, and the folders that are empty then."""
        path = self._held_path(key)
        with _translated(key):
            if path is None or _stat(path) is None:
                return
            with self._locked():
                if _stat(path) is not None:
                    path.unlink()
                    sync_directory(path.parent)
                self._notes.remove(key)
                self._prune(path.parent)

    def _held_path(self, key: str) -> Path | None:
        """Where the object is, if there is one; None where the file system has it under another name."""
        if not is_new_form(key) and not self._listing.has(key):
            check_key(key)
        path = self._path(key)
        with _translated(key):
            return path if self._names.same(key) else None

    def _check_name(self, key: str, written: Path | None = None) -> None:
        """Raises BadKey where the file system would give, or has just given, the object another name than its key's;
        what was `written` is removed then, which was nothing else's: see the first of the two calls.
        """
        if not self._names.same(key):
            if written is not None:
                written.unlink()
                self._prune(written.parent)
            raise BadKey(
                f"object key {key!r} has another name on this disk, whose file system changes case or Unicode",
                "use one spelling of each name, or a file system that keeps names as they are",
            )

    def _path(self, key: str) -> Path:
        if key.split("/", 1)[0] == HIDDEN:
            raise Rejected(
                f"object key {key!r} lies in the store's own folder {HIDDEN}", "choose another first segment"
            )
        path = self._root / key
        if os.path.realpath(path) != str(path):
            raise Rejected(
                f"object key {key!r} leads through a symbolic link", f"replace the link below {self._root} by a folder"
            )
        return path

    @contextmanager
    def _spooled(self, chunks: Iterable[bytes], put: Put) -> Iterator[tuple[Path, "_Sealed"]]:
        """A synced temporary file on the root's file system."""
        _make_folder(self._hidden / "tmp")
        path = self._hidden / "tmp" / uuid4().hex
        try:
            with path.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                sealed = self._seal(file, self._clock_ns(), put)
            yield path, sealed
        finally:
            path.unlink(missing_ok=True)

    def _seal(self, file: BinaryIO, at_ns: int, put: Put) -> "_Sealed":
        """Give the file its time, the clock's since the kernel's own is coarser, and its note; then make it durable."""
        descriptor = file.fileno()
        os.utime(descriptor, ns=(at_ns, at_ns))
        found = os.fstat(descriptor)
        etag = _etag(found)
        noted = self._notes.attach(descriptor, etag, put)
        sync_file(descriptor)
        return _Sealed(etag, found.st_mtime_ns, noted)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time: threads of this object wait for each other, processes on the file."""
        _make_folder(self._hidden)
        path = self._hidden / "lock"
        with self._turn:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                _lock(descriptor, path)
                yield
            finally:
                os.close(descriptor)  # gives the lock back

    def _look(self, key: str, path: Path) -> tuple[ObjectInfo | None, bool]:
        """What is there, and whether that is certain: it is not when the note belongs to another version."""
        found = _stat(path)
        if found is None:
            return None, True
        return self._notes.read(key, path, _info(key, found))

    def _prune(self, folder: Path) -> None:
        while folder != self._root:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                return
            folder = folder.parent


def _check_expected(key: str, expected: str | None, held: os.stat_result | None) -> None:
    found = "" if held is None else _etag(held)
    if expected is not None and expected != found:
        raise Conflict(
            f"{key}: expected {expected or 'no object'}, found {found or 'none'}", "nothing to do: it is read again"
        )


def _etag(found: os.stat_result) -> str:
    return f'"{found.st_ino:x}-{found.st_mtime_ns}-{found.st_size}"'


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    modified_at = EPOCH + timedelta(microseconds=found.st_mtime_ns // 1000)
    return ObjectInfo(key, found.st_size, _etag(found), modified_at)


def _stat(path: Path) -> os.stat_result | None:
    """A regular file's properties; None for anything else and for nothing."""
    try:
        found = path.lstat()
    except ABSENT:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _open(path: Path) -> BinaryIO | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO must not hang the reader
    except ABSENT:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    return None


def _copied(path: Path, target: Path) -> str | None:
    """The ETag of what was copied, which is one version: an open file keeps its bytes when its name is replaced."""
    file = _open(path)
    if file is None:
        return None
    with file, ExitStack() as undo:
        undo.callback(target.unlink, missing_ok=True)
        with target.open("xb") as copy:
            copyfileobj(file, copy, CHUNK_BYTES)
        undo.pop_all()
        return _etag(os.fstat(file.fileno()))


def _lock(descriptor: int, path: Path) -> None:
    """Wait for the file's lock. The kernel frees it when the descriptor is closed, however its process ends."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise Transient(
                    f"{path} is held by another process for over {LOCK_SECONDS} s",
                    "find it with `fuser` on that file",
                ) from error
            time.sleep(POLL_SECONDS)
        else:
            return


def _make_folder(folder: Path) -> None:
    """With all parents, each made durable."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_directory(folder.parent)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _said(what, error) from error


def _said(what: str, error: OSError) -> AppError:
    """The file system's refusal as what the caller should do."""
    text = f"{what}: {error.strerror}"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return Transient(text, "free space on the disks that hold the object directory and DATA_DIR")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return Permanent(text, "let the service's user write to the object directory, or set DATA_DIR")
        case errno.EIO:
            return Permanent(text, "the disk failed: check the kernel's log")
        case errno.EISDIR | errno.ENOTDIR | errno.EEXIST | errno.ENOTEMPTY:
            return Rejected(text, "another object's key has this key as a folder, or the other way round: rename one")
        case errno.ENAMETOOLONG | errno.EINVAL | errno.EILSEQ:
            return Rejected(text, "this file system cannot hold such a name: shorten each segment to 255 bytes")
        case _:
            return Transient(text, "check the disk that holds the object directory")
