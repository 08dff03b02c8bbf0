"""Google Drive as a sink, and a local directory for a start without Google: the same files under the same names.

One file per hour name, whatever is lost, repeated or done to it by people.

Invariants: a create carries an id that the state store has already, so its repetition can only find the same file; what
Drive holds is asked of Drive, and MD5 and head revision say what it is; of several files of a name the oldest is it.
Only what may be a CSV file is one: folders, shortcuts, Google documents and pictures of the name are left alone. In a
directory a file is whole or absent at every instant; its version is the MD5 of its bytes.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from hashlib import md5
from pathlib import Path

from app.core.errors import Conflict, Permanent, Transient
from app.core.files import temporary_file, write_durably
from app.core.pipeline import Checkpoints, Commit, ObjectState, Record
from app.core.runs import Lease
from app.core.windows import Window
from app.dynamo_to_drive.drive import (
    FOLDER_TYPE,
    GOOGLE_TYPES,
    RIGHTS_HINT,
    SHARE_HINT,
    SHORTCUT_TYPE,
    Drive,
    DriveFile,
    FileContent,
)
from app.dynamo_to_drive.hour_file import (
    Accounts,
    HourFile,
    UnreadableFile,
    lines_in,
    read_file,
    readable,
    readable_prefix,
)

MEMORY_BYTES = 1 << 20
READ_HINT = "no action needed: it is read again"
NEW_IDS = 3
log = logging.getLogger(__name__)


def hour_of(key: str) -> Window:
    """The hour of a file's name."""
    start = datetime.strptime(key.removesuffix(".csv")[-11:] + "+0000", "%Y%m%d_%H%z")
    return Window(start, start + timedelta(hours=1))


class DriveFolder:
    """The folder that takes the files, `folder_id` (never empty): looked up once per process, and again after a
    failure. `told`: ids of other things in it that were warned of.
    """

    def __init__(self, folder_id: str, shared_drive_id: str) -> None:
        self.folder_id = folder_id
        self._shared_drive_id = shared_drive_id
        self.told = set[str]()
        self._drive_id: str | None = None

    def drive_id(self, drive: Drive) -> str:
        """The shared drive of the folder, "" in My Drive. Raises Permanent for what is not a folder or is read-only."""
        if self._drive_id is not None:
            return self._drive_id
        folder, what = drive.folder(self.folder_id), f"GOOGLE_DRIVE_FOLDER_ID {self.folder_id}"
        if folder.get("mimeType") == SHORTCUT_TYPE:
            raise Permanent(f"{what} is a shortcut", "set GOOGLE_DRIVE_FOLDER_ID to the folder that it leads to")
        if folder.get("mimeType") != FOLDER_TYPE or folder.get("trashed"):
            raise Permanent(f"{what} is {'in the trash' if folder.get('trashed') else 'not a folder'}", SHARE_HINT)
        if folder.get("capabilities", {}).get("canAddChildren") is False:
            raise Permanent(f"{what} may not be written by this account", RIGHTS_HINT)
        drive_id = str(folder.get("driveId") or "")
        if self._shared_drive_id and drive_id != self._shared_drive_id:
            told = f"{what} is not on the shared drive {self._shared_drive_id}"
            hint = f"set GOOGLE_SHARED_DRIVE_ID to {drive_id}"
            raise Permanent(told, hint if drive_id else "unset GOOGLE_SHARED_DRIVE_ID: it is in My Drive")
        self._drive_id = drive_id
        return drive_id

    def forget(self) -> None:
        """Look again next time."""
        self._drive_id = None


@dataclass(frozen=True, slots=True)
class FileIds:
    """The ids of files, durable before the files are: the record of an hour has `id:revision` as its version."""

    checkpoints: Checkpoints
    pipeline: str
    partition: str
    lease: Lease

    def known(self, key: str) -> str:
        """The id in the record of the hour that `key` names; "" when none was kept."""
        hour = hour_of(key)
        records = self.checkpoints.records(self.pipeline, self.partition, hour.start, hour.end)
        return next((each.version.partition(":")[0] for each in records if each.key == key), "")

    def keep(self, key: str, file_id: str) -> None:
        """Commit a record that says no more than the id; the record of the write replaces it."""
        record = Record(hour_of(key), 0, key, f"{file_id}:", "", 0, 0, -1, None, None, closed=False)
        self.checkpoints.commit(self.pipeline, self.partition, Commit((record,)), self.lease)


class HourSink(ABC):
    """`app.core.pipeline.Sink` over CSV files, one for each hour. `accounts` is told what lies there and what landed.

    `escaped`: cells are guarded against formulas. `reads_rows` is set to False where a file is replaced whatever rows
    it has: then `head` is `peek`.
    """

    def __init__(self, accounts: Accounts, prefix: str, *, escaped: bool, dry_run: bool) -> None:
        self.reads_rows = True
        self._accounts = accounts
        self._prefix = prefix
        self._escaped = escaped
        self._dry_run = dry_run

    def key(self, partition: str, window: Window, part: int) -> str:  # noqa: ARG002 - one file an hour, no parts
        """The file's name, in UTC."""
        return f"{self._prefix}_{window.start:%Y%m%d_%H}.csv"

    def head(self, key: str) -> ObjectState | None:
        """The file with its rows, or None."""
        if not self.reads_rows:
            return self.peek(key)
        if held := self._head(key):
            self._accounts.note(hour_of(key), held=held.rows)
        return held

    def read(self, key: str, version: str) -> Iterator[Mapping[str, str]]:
        """The rows of that version. Raises Conflict when another one is there."""
        self._check(key, version)
        yield from self._rows(key, version)
        self._check(key, version)

    def encode(self, partition: str, window: Window, batch: HourFile) -> HourFile:
        """The batch is the file already; a dry run says that it would be written."""
        if self._dry_run:
            log.info(
                "%s: would be written, %d rows, %d bytes", self.key(partition, window, 0), batch.rows, batch.size_bytes
            )
            self._accounts.note(window, waiting=batch.rows)
        return batch

    def put(self, key: str, encoded: HourFile, expected: str | None, *, closing: bool = False) -> str:  # noqa: ARG002
        """Write the file when what is there is the expected version still. Raises Conflict."""
        if expected is not None:
            self._check(key, expected)
        landed = encoded.landed_over(readable_prefix(self._rows(key, expected)) if expected else ())
        version = self._put(key, encoded, expected)
        self._accounts.note(hour_of(key), landed=landed)
        return version

    @abstractmethod
    def peek(self, key: str) -> ObjectState | None:
        """As `head`, without a look at the rows: version and MD5."""

    @abstractmethod
    def listed(self, hour: Window) -> Iterator[tuple[str, str]]:
        """Names and MD5 of every file on the day of `hour`."""

    @abstractmethod
    def _head(self, key: str) -> ObjectState | None: ...

    @abstractmethod
    def _rows(self, key: str, version: str) -> Iterator[Mapping[str, str]]: ...

    @abstractmethod
    def _check(self, key: str, version: str) -> None: ...

    @abstractmethod
    def _put(self, key: str, encoded: HourFile, expected: str | None) -> str: ...

    def _day(self, hour: Window) -> str:
        """How the names of a day begin."""
        return self.key("", hour, 0).removesuffix(f"{hour.start:%H}.csv")


class DriveSink(HourSink):
    """Over Drive; a version is `id:headRevisionId`."""

    def __init__(
        self,
        drive: Drive,
        folder: DriveFolder,
        ids: FileIds,
        accounts: Accounts,
        *,
        prefix: str,
        escaped: bool,
        dry_run: bool,
    ) -> None:
        super().__init__(accounts, prefix, escaped=escaped, dry_run=dry_run)
        self._drive = drive
        self._folder = folder
        self._ids = ids

    def peek(self, key: str) -> ObjectState | None:
        """The file of that name in the folder, else the one with the known id wherever a person moved it."""
        found = self._find(key)
        return None if found is None else ObjectState(_version(found), found.md5)

    def _head(self, key: str) -> ObjectState | None:
        found = self._find(key)
        return (
            None
            if found is None
            else ObjectState(_version(found), found.md5, self._count(found), size_bytes=found.size_bytes)
        )

    def listed(self, hour: Window) -> Iterator[tuple[str, str]]:
        """Of several files of one name, the oldest."""
        seen = set[str]()
        for found in self._drive.beginning(self._day(hour), self._folder.folder_id, self._folder.drive_id(self._drive)):
            if found.is_csv and found.name not in seen:
                seen.add(found.name)
                yield found.name, found.md5

    def _put(self, key: str, encoded: HourFile, expected: str | None) -> str:
        """Create under the id that was kept before, or replace the content."""
        properties = {"headwaterMd5": encoded.digest, "headwaterRows": str(encoded.rows)}
        if encoded.min_at and encoded.max_at:
            properties |= {"headwaterFrom": encoded.min_at.isoformat(), "headwaterTo": encoded.max_at.isoformat()}
        content = FileContent(encoded.file, encoded.digest, encoded.size_bytes, properties)
        made = self._create(key, content) if expected is None else self._drive.update(_id(expected), content)
        log.info("%s: uploaded, %d rows, %d bytes", key, encoded.rows, encoded.size_bytes)
        return _version(made)

    def _create(self, key: str, content: FileContent) -> DriveFile:
        self._folder.forget()  # once an hour: a person may have put the folder into the trash, or elsewhere
        self._folder.drive_id(self._drive)
        file_id = self._ids.known(key)
        for _ in range(NEW_IDS):
            held = self._drive.get(file_id) if file_id else None
            if held is not None and held.is_hour:
                raise Conflict(f"{key}: is there already", READ_HINT)
            if not file_id or held is not None:  # an id in the trash cannot be used again
                file_id = self._drive.new_id()
                self._ids.keep(key, file_id)
            made = self._drive.create(file_id, key, self._folder.folder_id, content)
            if made is not None:
                return made
            held = self._drive.get(file_id)
            if held is not None and held.is_hour and held.md5 == content.md5:
                return held
            if held is None:  # used once and deleted for good
                file_id = ""
        raise Transient(f"{key}: Drive found {NEW_IDS} ids in use", "no action needed: the next run tries new ones")

    def _find(self, key: str) -> DriveFile | None:
        try:
            named = self._drive.named(key, self._folder.folder_id, self._folder.drive_id(self._drive))
        except Permanent:
            self._folder.forget()
            raise
        for other in named:
            # Said once per process: a person may wonder which of the two is ours.
            if not other.is_csv and other.file_id not in self._folder.told:
                self._folder.told.add(other.file_id)
                what = other.mime_type.replace(GOOGLE_TYPES, "a Google ")
                log.warning("%s: %s has the same name (%s); it is left alone", other.name, what, other.file_id)
        if found := [each for each in named if each.is_csv]:
            self._put_aside(key, found[1:])
            return found[0]
        file_id = self._ids.known(key)
        held = self._drive.get(file_id) if file_id else None
        return held if held is not None and held.is_hour else None

    def _put_aside(self, key: str, others: Sequence[DriveFile]) -> None:
        """Several files of one name: the oldest is the file, the others go to the trash, where people can find them."""
        for other in others:
            log.warning("%s: is there more than once; the oldest is kept, %s goes to the trash", key, other.file_id)
            if self._dry_run:
                continue
            try:
                self._drive.trash(other.file_id)
            except Permanent as error:
                log.warning("%s: %s could not be put into the trash: %s", key, other.file_id, error)

    def _check(self, key: str, version: str) -> None:
        held = self._drive.get(_id(version))
        if held is None or held.trashed or _version(held) != version:
            raise Conflict(f"{key}: is not the version {version} any more", READ_HINT)

    def _count(self, found: DriveFile) -> int:
        """The rows, as its writer noted them; of a file that somebody else wrote or edited, counted.

        What was made unreadable has no rows to keep, and is replaced: Drive has its text among the versions.
        """
        noted = int(found.properties.get("headwaterRows", 0))
        if found.properties.get("headwaterMd5") == found.md5:
            return noted
        try:
            rows = sum(1 for _ in self._rows(found.name, found.file_id))
        except UnreadableFile as error:
            log.warning("%s: %s; re-created; the old content is in the file's revisions", found.name, error.message)
            rows = 0
        if rows < noted:
            told = f"{noted - rows} rows were taken out by a person; those that the table lacks are in its revisions"
            told = f"{found.name}: {told}"
            log.warning("%s", told)
            self._accounts.removed.append(told)
        return rows

    def _rows(self, key: str, version: str) -> Iterator[Mapping[str, str]]:  # noqa: ARG002 - the id says which
        file_id = _id(version)
        with temporary_file(memory_bytes=MEMORY_BYTES) as spool:
            self._drive.download(file_id, spool)
            with readable(file_id):
                yield from read_file(lines_in(spool), escaped=self._escaped)


def _id(version: str) -> str:
    return version.partition(":")[0]


def _version(found: DriveFile) -> str:
    return f"{found.file_id}:{found.revision}"


BLOCK_BYTES = 1 << 18


class FolderSink(HourSink):
    """Over a directory that the first write makes; the MD5 is version and digest."""

    def __init__(self, root: Path, accounts: Accounts, *, prefix: str, escaped: bool, dry_run: bool) -> None:
        super().__init__(accounts, prefix, escaped=escaped, dry_run=dry_run)
        self._root = root

    def peek(self, key: str) -> ObjectState | None:
        """See `HourSink.peek`."""
        version = self._version(key)
        return None if version is None else ObjectState(version, version)

    def _head(self, key: str) -> ObjectState | None:
        version = self._version(key)
        if version is None:
            return None
        rows = sum(1 for _ in self._rows(key, version))
        return ObjectState(version, version, rows, size_bytes=(self._root / key).stat().st_size)

    def listed(self, hour: Window) -> Iterator[tuple[str, str]]:
        """See `HourSink.listed`."""
        with _translated(self._root):
            names = sorted(path.name for path in self._root.glob("*.csv") if path.is_file())
        for name in names:
            if name.startswith(self._day(hour)) and (version := self._version(name)):
                yield name, version

    def _put(self, key: str, encoded: HourFile, expected: str | None) -> str:
        if expected is None and self._version(key) is not None:
            raise Conflict(f"{key}: is there already", READ_HINT)
        encoded.file.seek(0)
        with _translated(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            write_durably(self._root / key, iter(partial(encoded.file.read, BLOCK_BYTES), b""))
        log.info("%s: written, %d rows, %d bytes", self._root / key, encoded.rows, encoded.size_bytes)
        return encoded.digest

    def _check(self, key: str, version: str) -> None:
        if self._version(key) != version:
            raise Conflict(f"{key}: is not the version that was read before", READ_HINT)

    def _version(self, key: str) -> str | None:
        digest, path = md5(usedforsecurity=False), self._root / key
        with _translated(self._root):
            try:
                if not path.is_file() and os.path.lexists(path):  # opening a pipe would wait for ever
                    what = "a directory" if path.is_dir() else "not a regular file"
                    raise Permanent(f"{path}: is {what}", "move it away: the file has its name")
                with path.open("rb") as file:
                    while block := file.read(BLOCK_BYTES):
                        digest.update(block)
            except FileNotFoundError:
                return None
        return digest.hexdigest()

    def _rows(self, key: str, version: str) -> Iterator[Mapping[str, str]]:  # noqa: ARG002 - there is one
        with _translated(self._root), (self._root / key).open("rb") as file, readable(key):
            yield from read_file(lines_in(file), escaped=self._escaped)


@contextmanager
def _translated(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Permanent(
            f"{root}: {error.strerror or error}", "make DATA_DIR writable, and free space on its disk"
        ) from error
