"""Sinks for hourly files: Google Drive, or a local directory if Google is not set up, with the same file names.

There is one file per hour, whatever gets lost, is repeated or is changed by people.

Invariants: a create carries an id that is already in the state store, so a retry can only hit the same file; the state
of a file is always read from Drive, by MD5 and head revision; of several files with one name the oldest counts. Only
files that may be CSV count: folders, shortcuts, Google documents and pictures with the name are ignored. In a
directory a file is always whole or absent; its version is the MD5 of its bytes.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO

from app.core.errors import Conflict, Permanent, Transient
from app.core.files import temporary_file, write_durably
from app.core.pipeline import Checkpoints, Commit, ObjectState, Record
from app.core.runs import Lease
from app.core.windows import HOUR_SECONDS, Window, windows_between
from app.dynamo_to_drive.accounts import WOULD_WRITE, WRITTEN, Accounts
from app.dynamo_to_drive.drive import ESCAPED, GOOGLE_TYPES, Drive, DriveFile
from app.dynamo_to_drive.hour_file import HourFile, UnreadableFile, lines_in, md5_of, read_file, readable

MEMORY_BYTES = 1 << 20
READ_HINT = "no action needed: it is read again"
NEW_IDS = 3
log = logging.getLogger(__name__)


def hour_of(key: str) -> Window:
    """The hour in a file name."""
    start = datetime.strptime(key.removesuffix(".csv")[-11:] + "+0000", "%Y%m%d_%H%z")
    return Window(start, start + timedelta(hours=1))


@dataclass(slots=True)
class HourSink(ABC):
    """`app.core.pipeline.Sink` over CSV files, one per hour. `accounts` records what was there and what was written.

    `checkpoints` has the records of `pipeline` for `partition`, changed under `lease`. `escaped`: cells are escaped
    against formulas.
    """

    checkpoints: Checkpoints
    pipeline: str
    partition: str
    lease: Lease
    accounts: Accounts
    prefix: str
    escaped: bool
    dry_run: bool

    def key(self, partition: str, window: Window, part: int) -> str:  # noqa: ARG002 - one file an hour, no parts
        """The file's name, in UTC."""
        return f"{self.prefix}_{window.start:%Y%m%d_%H}.csv"

    def head(self, key: str) -> ObjectState | None:
        """The file's version and MD5; None if there is no file."""
        held = self._head(key)
        self.accounts.note(hour_of(key), held_digest=held.digest if held else "")
        return held

    def read(self, key: str, version: str) -> Iterator[Mapping[str, str]]:
        """The rows of that version, to be merged. Raises Conflict if the file has other bytes than `head` said."""
        record, hour = self._record(key), hour_of(key)
        digest = self.accounts.of(hour).held_digest
        self.accounts.note(hour, is_edited=not record or record.digest != digest)
        with self._opened(key, version) as file:
            if md5_of(file) != digest:
                raise Conflict(f"{key}: is not the version {version} any more", READ_HINT)
            yield from self._mergeable(key, file)

    def rows(self, key: str, version: str) -> Iterator[Mapping[str, str]]:
        """The rows of the file. Raises UnreadableFile, perhaps after some of them."""
        with self._opened(key, version) as file:
            yield from self._rows(key, file)

    def encode(
        self,
        partition: str,
        window: Window,
        batch: HourFile,
        *,
        summarises: bool = True,  # noqa: ARG002 - the port's
    ) -> HourFile:
        """Returns the batch, which already is the file; a dry run logs that it would be written."""
        if self.dry_run:
            log.info(
                "%s: would be written, %d rows, %d bytes", self.key(partition, window, 0), batch.rows, batch.size_bytes
            )
            self.accounts.note(window, outcome=WOULD_WRITE)
        return batch

    def put(self, key: str, encoded: HourFile, expected: str | None, *, closing: bool = False) -> str:  # noqa: ARG002
        """Write the file if the existing one still has the expected version. Raises Conflict."""
        if expected is not None:
            self._check(key, expected)
        version = self._put(key, encoded, expected)
        self.accounts.note(hour_of(key), outcome=WRITTEN)
        return version

    @abstractmethod
    def listed(self, day: Window) -> Iterator[tuple[str, str]]:
        """The name and MD5 of every file of a day."""

    @abstractmethod
    def _opened(self, key: str, version: str) -> AbstractContextManager[BinaryIO]: ...

    @abstractmethod
    def _head(self, key: str) -> ObjectState | None: ...

    @abstractmethod
    def _check(self, key: str, version: str) -> None: ...

    @abstractmethod
    def _put(self, key: str, encoded: HourFile, expected: str | None) -> str: ...

    def _rows(self, key: str, file: BinaryIO) -> Iterator[Mapping[str, str]]:
        with readable(key):
            yield from read_file(lines_in(file), escaped=self._is_escaped(key))

    def _is_escaped(self, key: str) -> bool:  # noqa: ARG002 - of a file in a directory nothing is known
        return self.escaped

    def _mergeable(self, key: str, file: BinaryIO) -> Iterator[Mapping[str, str]]:
        return self._rows(key, file)

    def _record(self, key: str) -> Record | None:
        """The record of the hour that `key` names."""
        hour = hour_of(key)
        records = self.checkpoints.records(self.pipeline, self.partition, hour.start, hour.end)
        return next((each for each in records if each.key == key), None)

    def _day(self, day: Window) -> str:
        """The beginning of the names of a day's files."""
        return self.key("", day, 0).removesuffix("00.csv")


@dataclass(slots=True)
class DriveSink(HourSink):
    """An `HourSink` on Google Drive; a version is `id:headRevisionId`, and the id is stored before the file is created.

    `noted`: the properties of the files as written. `told`: other items that were already warned about.
    """

    drive: Drive
    told: set[str]
    noted: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def listed(self, day: Window) -> Iterator[tuple[str, str]]:
        """See `HourSink.listed`; of several files with one name, the oldest."""
        hours = {self.key("", hour, 0): hour for hour in windows_between(day.start, day.end, HOUR_SECONDS)}
        for found in self.drive.beginning(self._day(day)):
            if found.name in hours and found.is_of(hours[found.name]):
                del hours[found.name]
                yield found.name, found.md5_checksum

    @contextmanager
    def _opened(self, key: str, version: str) -> Iterator[BinaryIO]:
        with temporary_file(memory_bytes=MEMORY_BYTES) as spool:
            if not self.drive.download(_id(version), spool):
                raise Conflict(f"{key}: is gone", READ_HINT)
            yield spool

    def _head(self, key: str) -> ObjectState | None:
        """The file of that name in the folder, else the file with the stored id, wherever a person moved it."""
        if (found := self._find(key)) is None:
            return None
        self.noted[key] = found.app_properties
        return ObjectState(found.version, found.md5_checksum, size_bytes=found.size)

    def _mergeable(self, key: str, file: BinaryIO) -> Iterator[Mapping[str, str]]:
        """The rows up to the first unreadable one: the file is re-created, and its old content stays in its revisions.

        Reports how many rows a person took out.
        """
        rows = 0
        try:
            for row in self._rows(key, file):
                rows += 1
                yield row
        except UnreadableFile as error:
            log.warning("%s; re-created; the old content is in the file's revisions", error.message)
        if rows < (written := int(self.noted[key].get("headwaterRows", 0))):
            told = f"{written - rows} rows were taken out by a person; those that the table lacks are in its revisions"
            log.warning("%s: %s", key, told)
            self.accounts.removed.append(f"{key}: {told}")

    def _is_escaped(self, key: str) -> bool:
        """As the file was written, also where CSV_ESCAPE_FORMULAS changed since; earlier versions did not note it."""
        noted = self.noted[key].get(ESCAPED)
        return noted == "true" if noted else self.escaped

    def _put(self, key: str, encoded: HourFile, expected: str | None) -> str:
        """Create the file under a stored id, or replace its content."""
        made = self._create(key, encoded) if expected is None else self.drive.update(_id(expected), encoded)
        log.info("%s: uploaded, %d rows, %d bytes", key, encoded.rows, encoded.size_bytes)
        return made.version

    def _create(self, key: str, hour: HourFile) -> DriveFile:
        self.drive.check_folder()  # once an hour: a person may have trashed or moved it
        file_id = self._file_id(key)
        for _ in range(NEW_IDS):
            held = self.drive.get(file_id) if file_id else None
            if held is not None and held.is_csv and not held.trashed:
                raise Conflict(f"{key}: already exists", READ_HINT)
            if not file_id or held is not None:  # the id of a trashed file cannot be reused
                file_id = self.drive.new_id()
                # Only the id; the record of the write replaces this one.
                record = Record(hour_of(key), 0, key, f"{file_id}:", "", 0, 0, -1, None, None, closed=False)
                self.checkpoints.commit(self.pipeline, self.partition, Commit((record,)), self.lease)
            made = self.drive.create(file_id, key, hour)
            if made is not None:
                return made
            held = self.drive.get(file_id)
            if held is not None and not held.trashed and held.md5_checksum == hour.digest:
                return held
            if held is None:  # the id was used, and its file permanently deleted
                file_id = ""
        raise Transient(f"{key}: Drive found {NEW_IDS} ids in use", "no action needed: the next run tries new ones")

    def _find(self, key: str) -> DriveFile | None:
        named, hour = self.drive.named(key), hour_of(key)
        found = [each for each in named if each.is_of(hour)]
        for other in named:
            # Warn once per process: a person may wonder which of the two is ours.
            if other not in found and other.id not in self.told:
                self.told.add(other.id)
                what = "another hour's file" if other.is_csv else other.mime_type.replace(GOOGLE_TYPES, "a Google ")
                log.warning("%s: %s has the same name (%s); it is left alone", other.name, what, other.id)
        if found:
            self._put_aside(key, found[1:])
            return found[0]
        file_id = self._file_id(key)
        held = self.drive.get(file_id) if file_id else None
        return held if held is not None and held.is_csv and not held.trashed else None

    def _file_id(self, key: str) -> str:
        """The file id in the record; "" if there is none."""
        record = self._record(key)
        return _id(record.version) if record else ""

    def _put_aside(self, key: str, others: Sequence[DriveFile]) -> None:
        """Trash duplicates of the oldest file with this name; people can still find them in the trash."""
        for other in others:
            log.warning("%s: exists more than once; the oldest is kept, %s goes to the trash", key, other.id)
            if self.dry_run:
                continue
            try:
                self.drive.trash(other.id)
            except Permanent as error:
                log.warning("%s: %s could not be put into the trash: %s", key, other.id, error)

    def _check(self, key: str, version: str) -> None:
        held = self.drive.get(_id(version))
        if held is None or held.trashed or held.version != version:
            raise Conflict(f"{key}: is not the version {version} any more", READ_HINT)


def _id(version: str) -> str:
    return version.partition(":")[0]


BLOCK_BYTES = 1 << 18


@dataclass(slots=True)
class FolderSink(HourSink):
    """An `HourSink` on a directory, created by the first write; version and digest are the MD5."""

    root: Path

    @contextmanager
    def _opened(self, key: str, version: str) -> Iterator[BinaryIO]:  # noqa: ARG002 - there is one
        with _translated(self.root), ExitStack() as opened:
            try:
                file = opened.enter_context((self.root / key).open("rb"))
            except FileNotFoundError as error:
                raise Conflict(f"{key}: is gone", READ_HINT) from error
            yield file

    def listed(self, day: Window) -> Iterator[tuple[str, str]]:
        """See `HourSink.listed`."""
        with _translated(self.root):
            names = sorted(path.name for path in self.root.glob("*.csv") if path.is_file())
        for name in names:
            if name.startswith(self._day(day)) and (held := self._head(name)):
                yield name, held.digest

    def _put(self, key: str, encoded: HourFile, expected: str | None) -> str:
        if expected is None and self._head(key) is not None:
            raise Conflict(f"{key}: already exists", READ_HINT)
        encoded.file.seek(0)
        with _translated(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            write_durably(self.root / key, iter(partial(encoded.file.read, BLOCK_BYTES), b""))
        log.info("%s: written, %d rows, %d bytes", self.root / key, encoded.rows, encoded.size_bytes)
        return encoded.digest

    def _check(self, key: str, version: str) -> None:
        held = self._head(key)
        if held is None or held.version != version:
            raise Conflict(f"{key}: is not the version that was read before", READ_HINT)

    def _head(self, key: str) -> ObjectState | None:
        path = self.root / key
        with _translated(self.root):
            try:
                if not path.is_file() and os.path.lexists(path):  # opening a pipe would block forever
                    what = "a directory" if path.is_dir() else "not a regular file"
                    raise Permanent(f"{path}: is {what}", "move it away: it has the name of the file")
                with path.open("rb") as file:
                    digest = md5_of(file)
                    return ObjectState(digest, digest, size_bytes=file.tell())
            except FileNotFoundError:
                return None


@contextmanager
def _translated(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Permanent(
            f"{root}: {error.strerror or error}", "make DATA_DIR writable, and free space on its disk"
        ) from error
