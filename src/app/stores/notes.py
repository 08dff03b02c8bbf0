"""Content type and metadata of a file of `local_directory`, which a plain file has no place for.

Kept as an extended attribute of the file itself, so that both appear with one rename; where the file system has none,
or the note is too long for one, in a file below `folder` named by the key's SHA-256: a name built from the key itself
could be too long, or stand where another key needs a folder. Invariant: a note names the ETag that it belongs to and
counts for no other, so a crash or a change by another program loses metadata and never gives an object another's.
"""

import errno
import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from app.core.files import replace_durably, sync_file
from app.stores.objects import ObjectInfo, Put

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
