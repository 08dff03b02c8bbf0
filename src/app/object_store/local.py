"""The object store port on a local directory: a key is a path below the root, readable by any other program.

Invariants: a name always holds the whole old object or the whole new one, even after a kill or a power cut; check and
rename happen under one lock for all threads and processes, which is never held while a body is streamed; symbolic links
below the root are not followed. What a plain file cannot hold is kept below `.headwater/`, which no listing shows:

    lock      held during check and rename
    tmp/      objects that are still being written; `probe` removes what killed processes left there
    meta/     content type and metadata of objects whose file cannot carry them, see `LocalMetadata`
"""

import errno
import hashlib
import json
import logging
import os
import stat
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO, TypeVar
from uuid import uuid4

from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient
from app.core.files import NAME_BYTES, sync_directory, sync_file, write_durably
from app.core.windows import EPOCH
from app.object_store.port import (
    AGAIN_HINT,
    CONTROL,
    MAX_KEY_BYTES,
    BadKey,
    LimitedBody,
    ListingBatch,
    ListingPage,
    ListingRequest,
    ObjectInfo,
    PutRequest,
    ReadableBody,
    StoredObject,
    check_characters,
    check_key,
    in_batches,
    page_of,
)

HIDDEN = ".headwater"
LOCK_SECONDS = 30
POLL_SECONDS = 0.005
LEFTOVER_NS = 24 * 3600 * 10**9
CHUNK_BYTES = 1 << 20
ABSENT = (FileNotFoundError, NotADirectoryError)
# Another disk, another user's file (fs.protected_hardlinks), a directory, no hard links here, too many.
UNLINKABLE = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)

log = logging.getLogger(__name__)

T = TypeVar("T")


class LocalDirectory:
    """Both ports on the files below `root`, which the first write creates. `clock_ns`: nanoseconds since the epoch.

    An ETag is the inode, modification time and size of the file: it needs no separate storage, and changes by another
    program are detected. Each write is a new file with a later time than the one it replaces, so no ETag is reused.
    Reading a key that is a directory, or below a file, finds nothing; writing it is Rejected.
    """

    def __init__(self, root: Path, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._root = os.path.realpath(root)
        self._hidden = f"{self._root}/{HIDDEN}"
        self._temporaries = f"{self._hidden}/tmp"  # noqa: S108 - below the root
        self._notes = LocalMetadata(Path(self._hidden, "meta"), Path(self._temporaries))
        self._names = LocalNames(Path(self._root), Path(self._temporaries))
        self._clock_ns = clock_ns
        self._turn = threading.Lock()
        self.conditional = False  # until `probe` has confirmed that the root can be written and locked
        self.segment_bytes = NAME_BYTES

    def probe(self) -> None:
        """Write and lock below the root, and remove what killed processes left there more than a day ago."""
        with _translated(self._root):
            with self._spooled([b"probe"], PutRequest("text/plain")) as (probe, _, _), self._locked():
                os.unlink(probe)
            oldest_ns = self._clock_ns() - LEFTOVER_NS
            for leftover in Path(self._temporaries).iterdir():
                found = _stat(leftover)
                if found is not None and found.st_mtime_ns < oldest_ns:
                    leftover.unlink(missing_ok=True)
        self.conditional = True

    def head(self, key: str) -> ObjectInfo | None:
        """Properties, with the metadata unless another program changed the file."""
        path = self._held_path(key)
        if path is None:
            return None
        with _translated(key), ExitStack() as lock:
            is_locked = False
            while (found := _stat(path)) is not None:
                info, certain = self._notes.read(key, path, _info(key, found))
                if certain or is_locked:
                    return info
                lock.enter_context(self._locked())  # a writer may be between note and rename: look again
                is_locked = True
        return None

    def put(self, key: str, body: BinaryIO, put: PutRequest) -> str:
        """As `write`."""
        return self._write(key, _chunks(body), put).etag

    @contextmanager
    def open(self, key: str, etag: str | None = None) -> Iterator[BinaryIO | None]:
        """The open file: it keeps its bytes for this reader even if it is replaced or deleted meanwhile."""
        path = self._held_path(key)
        with _translated(key):
            file = None if path is None else _open(path)
        if file is None:
            yield None
            return
        with file:
            if etag is not None and etag != _etag(os.fstat(file.fileno())):
                raise Conflict(f"{key}: is no longer the version {etag}", AGAIN_HINT)
            yield file

    def pin(self, key: str, target: Path) -> str | None:
        """Hard-link the current version to `target`, where it stays when the key is replaced or deleted; copy it where
        a hard link is impossible. Returns the version's ETag, None when there is no object.
        """
        path = self._held_path(key)
        if path is None:
            return None
        with _translated(key):
            try:
                # Use the ETag of the link: the name may already lead to a later version.
                os.link(path, target)
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
        """Depth first in UTF-8 order of the keys; holds the names of one directory at a time in memory."""
        folder = prefix.rpartition("/")[0]
        segments = folder.split("/") if folder else []
        # prefixes that no key starts with must not become a path
        if (
            prefix.startswith("/")
            or any(segment in ("", ".", "..") for segment in segments)
            or HIDDEN in segments[:1]
            or not CONTROL.isdisjoint(prefix)
            or prefix.encode("utf-8", "replace").decode() != prefix
        ):
            return
        if not self._has_link(folder):
            yield from self._walk(f"{folder}/" if folder else "", prefix)

    def batches(self, prefix: str, objects: int) -> Iterator[ListingBatch]:  # noqa: ARG002 - the port's
        """As listed: every file is read with stat."""
        return in_batches(self.list(prefix))

    def delete(self, key: str) -> None:
        """Remove the file, its metadata, and directories that are then empty."""
        path = self._held_path(key)
        with _translated(key):
            if path is None or _stat(path) is None:
                return
            with self._locked():
                if _stat(path) is not None:
                    os.unlink(path)
                    sync_directory(os.path.dirname(path))
                self._notes.remove(key)
                self._prune(os.path.dirname(path))

    properties = head  # which returns everything

    def write(self, key: str, body: ReadableBody, put: PutRequest) -> StoredObject:
        """Stream to a temporary file, then check and rename under the lock. Durable when it returns."""
        return self._write(key, _chunks(body), put)

    def _write(self, key: str, chunks: Iterable[bytes], put: PutRequest) -> StoredObject:
        path = self._path(check_key(key))
        folder = os.path.dirname(path)
        with _translated(key), self._spooled(chunks, put) as sealed, self._locked():
            spooled, made, noted = sealed
            self._check_name(key)
            held = _stat(path)
            found = "" if held is None else _etag(held)
            if put.expected not in (None, found):
                raise Conflict(f"{key}: expected {put.expected or 'no object'}, found {found or 'none'}", AGAIN_HINT)
            if held is not None and made.st_mtime_ns <= held.st_mtime_ns:
                # Make it newer than the replaced file even if the clock was set back: the inode may have belonged to an
                # earlier version, so only the time tells them apart. Inode, time and size survive the rename.
                with open(spooled, "rb+") as file:
                    made, noted = self._seal(file, held.st_mtime_ns + 1, put)
            try:
                if not noted:
                    _make_folder(folder)
                    self._notes.write(key, _etag(made), put)
                if held is None and os.path.isdir(path):
                    os.rmdir(path)  # an empty one was left by a killed writer; others hold another key's objects
                _in_folder(folder, partial(os.replace, spooled, path))
                sync_directory(folder)
            except OSError:
                self._prune(folder)
                raise
            # Only now is it certain which name the file system stored.
            self._check_name(key, written=path)
            return StoredObject(_etag(made), made.st_size)

    def patch(self, held: ObjectInfo, offset: int, body: ReadableBody) -> StoredObject:
        """Rewrites the whole object: its current readers keep the old bytes."""
        with self.open(held.key, held.etag) as old:
            if old is None:
                raise Conflict(
                    f"{held.key}: was deleted while it was patched", "look at the object, then send it again"
                )
            put = PutRequest(held.content_type, held.metadata, held.etag, held.headers)
            return self._write(held.key, _spliced(old, held.size_bytes, offset, body), put)

    @contextmanager
    def open_span(self, held: ObjectInfo, first: int, count: int) -> Iterator[ReadableBody]:
        """The open file, positioned at `first`."""
        with self.open(held.key, held.etag) as stream:
            if stream is None:
                raise Conflict(f"{held.key}: was deleted", AGAIN_HINT)
            stream.seek(first)
            yield LimitedBody(stream, count)

    def page(self, question: ListingRequest) -> ListingPage:
        """The keys after the last one of the previous page."""
        return page_of(self.list(question.prefix), question)

    def _held_path(self, key: str) -> str | None:
        """The path of the object, if it exists; None if the file system has it under another name. A key that no new
        object may have must be in the listing, where it comes before all others that begin with it.
        """
        try:
            check_key(key)
        except BadKey:
            if next((info.key for info in self.list(key)), None) != key:
                raise
        path = self._path(key)
        with _translated(key):
            return path if self._names.same(key) else None

    def _check_name(self, key: str, written: str = "") -> None:
        """Raises BadKey where the file system would store the key, or stored `written`, under a different name."""
        if not self._names.same(key):
            if written:
                os.unlink(written)  # safe: the name was checked before the write too, so the file is ours
                self._prune(os.path.dirname(written))
            raise BadKey(
                f"object key {key!r} has another name on this disk, whose file system changes case or Unicode",
                "use one spelling of each name, or a file system that keeps names as they are",
            )

    def _path(self, key: str) -> str:
        if key.partition("/")[0] == HIDDEN:
            raise Rejected(f"object key {key!r} is in the store's own folder {HIDDEN}", "choose another first segment")
        if self._has_link(key):
            raise Rejected(
                f"object key {key!r} leads through a symbolic link", f"replace the link below {self._root} by a folder"
            )
        return f"{self._root}/{key}"

    def _has_link(self, key: str) -> bool:
        path = self._root
        with suppress(OSError):  # nothing exists from here on, or the call that uses the path says what is wrong
            for segment in key.split("/"):
                path = f"{path}/{segment}"
                if stat.S_ISLNK(os.lstat(path).st_mode):
                    return True
        return False

    @contextmanager
    def _spooled(self, chunks: Iterable[bytes], put: PutRequest) -> Iterator[tuple[str, os.stat_result, bool]]:
        """A synced temporary file on the root's file system: path, properties, and whether it carries its own note. The
        block renames or removes it.
        """
        path = f"{self._temporaries}/{uuid4().hex}"
        with ExitStack() as undo:
            undo.callback(Path(path).unlink, missing_ok=True)
            with _in_folder(self._temporaries, lambda: open(path, "xb")) as file:
                file.writelines(chunks)
                file.flush()
                made, noted = self._seal(file, self._clock_ns(), put)
            yield path, made, noted
            undo.pop_all()

    def _seal(self, file: BinaryIO, at_ns: int, put: PutRequest) -> tuple[os.stat_result, bool]:
        """Set the file's time (from the clock, as the kernel's is coarser) and its note, then make it durable."""
        descriptor = file.fileno()
        os.utime(descriptor, ns=(at_ns, at_ns))
        made = os.fstat(descriptor)
        noted = self._notes.attach(descriptor, _etag(made), put)
        sync_file(descriptor)
        return made, noted

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time: a lock between threads, a file lock between processes, which the kernel releases when
        the descriptor is closed.
        """
        from filelock import lock_descriptor

        path = f"{self._hidden}/lock"
        with self._turn:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = _in_folder(self._hidden, partial(os.open, path, flags, 0o644))
            try:
                deadline = time.monotonic() + LOCK_SECONDS
                while not lock_descriptor(descriptor, blocking=False):
                    if time.monotonic() >= deadline:
                        held = f"another process has held {path} for over {LOCK_SECONDS} s"
                        raise Transient(held, "find it with `fuser` on that file")
                    time.sleep(POLL_SECONDS)
                yield
            finally:
                os.close(descriptor)

    def _walk(self, base: str, prefix: str) -> Iterator[ObjectInfo]:
        """Everything below the directory `base`. Directories get a trailing slash, so that they sort correctly: `a-b`
        comes before all of `a/`. Python sorts text by code point, which is the order of UTF-8.
        """
        names = []
        with _translated(base), suppress(*ABSENT), os.scandir(f"{self._root}/{base}") as entries:
            for entry in entries:  # empty if the directory was removed since its parent was read
                if entry.is_dir(follow_symlinks=False):
                    names.append(f"{base}{entry.name}/")
                elif entry.is_file(follow_symlinks=False):
                    names.append(base + entry.name)
        for key in sorted(name for name in names if _is_key(name.removesuffix("/"))):
            if key.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key, prefix)
            elif key.startswith(prefix):
                with _translated(key):
                    found = _stat(f"{self._root}/{key}")
                if found is not None:
                    yield _info(key, found)

    def _prune(self, folder: str) -> None:
        while folder != self._root:
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                pass
            except OSError:
                return
            folder = os.path.dirname(folder)


def _chunks(body: ReadableBody) -> Iterator[bytes]:
    return iter(partial(body.read, CHUNK_BYTES), b"")


def _spliced(old: BinaryIO, size_bytes: int, offset: int, body: ReadableBody) -> Iterator[bytes]:
    """The bytes of `old` up to `offset`, then a body, then the bytes of `old` after the body's end."""
    yield from _chunks(LimitedBody(old, offset))
    end = offset
    for chunk in _chunks(body):
        end += len(chunk)
        yield chunk
    old.seek(min(end, size_bytes))
    yield from _chunks(LimitedBody(old, max(size_bytes - end, 0)))


def _etag(found: os.stat_result) -> str:
    return f'"{found.st_ino:x}-{found.st_mtime_ns}-{found.st_size}"'


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    modified_at = EPOCH + timedelta(microseconds=found.st_mtime_ns // 1000)
    return ObjectInfo(key, found.st_size, _etag(found), modified_at)


def _is_key(name: str) -> bool:
    """Whether a file found here can be a key, including keys that no new object may have."""
    if name == HIDDEN:
        return False
    if name.isascii() and name.isprintable() and len(name) <= MAX_KEY_BYTES:
        return True
    try:
        check_characters(name)
    except Rejected as error:
        log.warning("left out of a listing: %s", error)
        return False
    return True


def _stat(path: str | Path) -> os.stat_result | None:
    """A regular file's properties; None for anything else, or if it does not exist."""
    try:
        found = os.lstat(path)
    except ABSENT:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _open(path: str) -> BinaryIO | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # do not block on a FIFO
    except ABSENT:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    return None


def _copied(path: str, target: Path) -> str | None:
    """Copy one version and return its ETag: an open file keeps its bytes when its name is replaced."""
    file = _open(path)
    if file is None:
        return None
    with file, ExitStack() as undo:
        undo.callback(target.unlink, missing_ok=True)
        with open(target, "xb") as copy:
            copyfileobj(file, copy, CHUNK_BYTES)
        undo.pop_all()
        return _etag(os.fstat(file.fileno()))


def _make_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        parent = os.path.dirname(folder)
        _make_folder(parent)
        with suppress(FileExistsError):
            os.mkdir(folder)
        sync_directory(parent)  # makes the new name durable


def _in_folder(folder: str, act: Callable[[], T]) -> T:
    """What `act` returns, which makes a file in `folder`. Nearly always it exists, so only a failure has it made."""
    try:
        return act()
    except FileNotFoundError:
        _make_folder(folder)
        return act()


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refusal(f"{what}: {error.strerror}", error.errno) from error


def _refusal(text: str, number: int | None) -> AppError:
    """The file system's error as an `AppError`."""
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            return Transient(text, "free space on the disks that hold the object directory and DATA_DIR")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return Permanent(text, "let the service's user write to the object directory, or set DATA_DIR")
        case errno.EIO:
            return Permanent(text, "check the kernel's log: the disk failed")
        case errno.EISDIR | errno.ENOTDIR | errno.EEXIST | errno.ENOTEMPTY:
            return Rejected(text, "rename one: another object's key has this key as a folder, or the other way round")
        case errno.ENAMETOOLONG | errno.EINVAL | errno.EILSEQ:
            return Rejected(text, "shorten each segment to 255 bytes: this file system cannot hold such a name")
        case _:
            return Transient(text, "check the disk that holds the object directory")


# Content type and metadata of an object, which a plain file cannot hold.
ATTRIBUTE = "user.headwater"
UNABLE = {errno.ENOTSUP, errno.ENOSPC, errno.E2BIG, errno.ERANGE, errno.EPERM}


class LocalMetadata:
    """The notes of one directory; unfinished ones are in `temporaries`. All methods may raise OSError.

    A note is an extended attribute of the object's file, so that both appear with one rename. Where the file system has
    none, or the note is too long, it is a file below `folder` named by the key's SHA-256: a name built from the key
    itself could be too long, or be where another key needs a directory. Invariant: a note is valid only for a file with
    the time and size of the ETag that it names, so a crash or a change by another program may lose metadata, but no
    object gets another's. The inode does not count: it is another one where the directory was moved or restored.
    """

    def __init__(self, folder: Path, temporaries: Path) -> None:
        self._folder = folder
        self._temporaries = temporaries

    def attach(self, descriptor: int, etag: str, put: PutRequest) -> bool:
        """Attach the note to the open file, durable with its next fsync; False if that is not possible."""
        if sys.platform != "linux":
            return False
        try:
            os.setxattr(descriptor, ATTRIBUTE, _note(etag, put))
        except OSError as error:
            if error.errno in UNABLE:
                return False
            raise
        return True

    def write(self, key: str, etag: str, put: PutRequest) -> None:
        """Write the note to a separate file, before the object with this ETag gets its name."""
        _make_folder(str(self._folder))
        write_durably(self._path(key), [_note(etag, put)], self._temporaries)

    def read(self, key: str, path: str, info: ObjectInfo) -> tuple[ObjectInfo, bool]:
        """`info` with its note, and whether that is certain: it is not while a writer may be between writing the note
        of the next version and renaming.
        """
        note = attached = None
        if sys.platform == "linux":
            with suppress(OSError):  # no attribute, no support, or the file is gone, which the caller notices as well
                note = attached = os.getxattr(path, ATTRIBUTE, follow_symlinks=False)
        if note is None:
            try:
                note = self._path(key).read_bytes()
            except FileNotFoundError:
                return info, True
        found = None
        with suppress(ValueError):  # truncated by a power cut
            found = json.loads(note)
        if not isinstance(found, dict):
            return info, True
        if found.get("etag", "").partition("-")[2] != info.etag.partition("-")[2]:  # all but the inode
            return info, attached is not None
        headers = found.get("headers", {})  # version 1.0 stored none
        return replace(info, content_type=found["content_type"], metadata=found["metadata"], headers=headers), True

    def remove(self, key: str) -> None:
        """Delete the note of a deleted object."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _note(etag: str, put: PutRequest) -> bytes:
    metadata = {name.lower(): value for name, value in put.metadata.items()}
    note = {"etag": etag, "content_type": put.content_type, "metadata": metadata, "headers": dict(put.headers)}
    return json.dumps(note).encode()


# Whether a file system stores names unchanged: some ignore case, some normalize Unicode or drop a trailing dot.
PROBE = "e\N{COMBINING ACUTE ACCENT}\N{LATIN SMALL LETTER E WITH ACUTE} a."


class LocalNames:
    """Names below `root`. `scratch` is a directory on the same file system, where names are tested once it exists.

    If names are stored unchanged, as on nearly every server, a check is free; otherwise each segment is compared with
    the names that its directory actually holds.
    """

    def __init__(self, root: Path, scratch: Path, names_in: Callable[[Path], Collection[str]] = os.listdir) -> None:
        self._root, self._scratch = root, scratch
        self._names_in = names_in
        self._kept: bool | None = None

    def same(self, key: str) -> bool:
        """False where a part of `key` leads to a file or directory that is not spelled exactly so. Raises OSError."""
        if self._kept is None and self._scratch.is_dir() and os.access(self._scratch, os.W_OK):
            self._kept = self._tried()
        if self._kept is not False:  # None: nothing was written here yet, or the directory is not writable
            return True
        folder = self._root
        for segment in key.split("/"):
            try:
                names = self._names_in(folder)
            except ABSENT:
                return True
            if segment not in names:
                return not os.path.lexists(folder / segment)
            folder = folder / segment
        return True

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
            return False  # not even this name works: check each one
        return kept and not twice
