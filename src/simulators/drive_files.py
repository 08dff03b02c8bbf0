"""Files of the Google Drive simulator: files by id, on shared drives and in My Drive; names need not be unique.

Invariants: an id is never reused, even after its file is deleted; every content change creates a new head revision,
every change a higher version. Thread-safe under `lock`. With a folder, all of this survives process restarts and
crashes, just as the real service outlives its callers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import md5, sha256
from itertools import count
from pathlib import Path
from threading import RLock
from typing import Any

import msgspec

GOOGLE_TYPES = "application/vnd.google-apps."
FOLDER_TYPE = f"{GOOGLE_TYPES}folder"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One version of a file, folder, shortcut or document. `drive_id` "" = My Drive. Only files have content."""

    file_id: str
    name: str
    parent: str
    drive_id: str
    mime_type: str
    created_at: datetime
    modified_at: datetime
    version: int
    revision: str = ""
    content: bytes = b""
    properties: Mapping[str, str] = field(default_factory=dict)
    trashed: bool = False

    @property
    def is_binary(self) -> bool:
        """False for Google's own types, which have no downloadable content."""
        return not self.mime_type.startswith(GOOGLE_TYPES)

    def to_json(self) -> dict[str, Any]:
        """The API's JSON, with every field."""
        told: dict[str, Any] = {
            "kind": "drive#file",
            "id": self.file_id,
            "name": self.name,
            "mimeType": self.mime_type,
            "parents": [self.parent],
            "version": str(self.version),
            "createdTime": _instant(self.created_at),
            "modifiedTime": _instant(self.modified_at),
            "trashed": self.trashed,
            "capabilities": {"canAddChildren": self.mime_type == FOLDER_TYPE, "canEdit": True},
        }
        if self.drive_id:
            told["driveId"] = self.drive_id
        if self.properties:
            told["appProperties"] = dict(self.properties)
        if self.is_binary:
            told["md5Checksum"] = md5(self.content, usedforsecurity=False).hexdigest()
            told["size"] = str(len(self.content))
            told["headRevisionId"] = self.revision
        return told


class Files:
    """All files. `used` holds every id that was ever a file's. Each file is saved in `folder`; None = not saved."""

    def __init__(self, clock: Callable[[], datetime], folder: Path | None = None) -> None:
        self.lock = RLock()
        self.held: dict[str, StoredFile] = {}
        self.used: set[str] = set()
        self._clock = clock
        self._folder = folder
        # Start from the time, so that ids handed out by earlier processes, which may still be in use, do not repeat.
        self._numbers = count(1 if folder is None else int(clock().timestamp() * 1000))
        if folder is not None:
            self._recall(folder)

    def new_id(self) -> str:
        """An unused id."""
        with self.lock:
            return f"1demo{next(self._numbers):028d}"

    def add(self, file: Mapping[str, Any], content: bytes = b"") -> StoredFile:
        """A new file from id, name, parent, drive_id, mime_type and properties. Raises KeyError for a used id."""
        with self.lock:
            if file["id"] in self.used:
                raise KeyError(file["id"])
            now, number = self._clock(), next(self._numbers)
            names = (file["name"], file["parent"], file["drive_id"], file["mime_type"])
            properties = file.get("properties", {})
            made = StoredFile(file["id"], *names, now, now, number, f"rev{number}", content, properties)
            self._hold(made.file_id, made)
            return made

    def change(self, file_id: str, **changes: Any) -> StoredFile:
        """The changed file; new content makes a new head revision. Trashing a folder also trashes its content."""
        with self.lock:
            if "trashed" in changes:
                for child in [each.file_id for each in self.held.values() if each.parent == file_id]:
                    self.change(child, trashed=changes["trashed"])
            number = next(self._numbers)
            if "content" in changes:
                changes["revision"] = f"rev{number}"
            changed = replace(self.held[file_id], version=number, modified_at=self._clock(), **changes)
            self._hold(file_id, changed)
            return changed

    def delete(self, file_id: str) -> None:
        """Delete permanently; the id stays used."""
        with self.lock:
            self._hold(file_id, None)

    def matching(self, holds: Callable[[StoredFile], bool]) -> Iterator[StoredFile]:
        """Every file for which `holds`, oldest first."""
        with self.lock:
            found = [file for file in self.held.values() if holds(file)]
        yield from sorted(found, key=lambda file: (file.created_at, file.version))

    def _hold(self, file_id: str, file: StoredFile | None) -> None:
        """Set the file of an id; None = deleted."""
        if self._folder is not None:
            kept = self._folder / f"{sha256(file_id.encode()).hexdigest()}.json"
            part = kept.with_suffix(".part")
            part.write_bytes(msgspec.json.encode((file_id, file)))
            part.replace(kept)
        self.used.add(file_id)
        if file is None:
            del self.held[file_id]
        else:
            self.held[file_id] = file

    def _recall(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for kept in folder.glob("*.json"):
            file_id, file = msgspec.json.decode(kept.read_bytes(), type=tuple[str, StoredFile | None])
            self.used.add(file_id)
            if file is not None:
                self.held[file_id] = file


def _instant(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"
