"""A local directory as the sink, for a start without Google: the same files under the same names.

Invariant: a file is whole or absent at every instant; its version is the MD5 of its bytes, as on Drive.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import md5
from pathlib import Path

from app.core.errors import Conflict, Permanent
from app.core.files import write_durably
from app.core.pipeline import Held
from app.core.windows import Window
from app.dynamo_to_drive.drive_sink import READ_HINT, HourBytes, file_name, hour_of
from app.dynamo_to_drive.hour_file import Accounts, HourFile, lines_in, read_file, readable, while_readable
from app.dynamo_to_drive.timestamps import Times

BLOCK_BYTES = 1 << 18
log = logging.getLogger(__name__)


class FolderSink:
    """`app.core.pipeline.Sink` over a directory, made on the first write. `accounts` is told what lies there."""

    def __init__(
        self, root: Path, prefix: str, times: Times, accounts: Accounts, *, escaped: bool, dry_run: bool
    ) -> None:
        self._root = root
        self._prefix = prefix
        self._times = times
        self._accounts = accounts
        self._escaped = escaped
        self._dry_run = dry_run

    def key(self, partition: str, window: Window, part: int) -> str:  # noqa: ARG002 - one file an hour, no parts
        """The file's name."""
        return file_name(self._prefix, window)

    def head(self, key: str) -> Held | None:
        """The file with its rows and span counted, or None."""
        version = self._version(key)
        if version is None:
            return None
        rows, first, last = 0, None, None
        for row in self._rows(key):
            last = next(iter(row.values()), "")
            first = last if first is None else first
            rows += 1
        min_at, max_at = (self._times.read(text or "").at for text in (first, last))
        self._accounts.held(hour_of(key), rows)
        return Held(version, version, rows, min_at, max_at, (self._root / key).stat().st_size)

    def peek(self, key: str) -> Held | None:
        """As `head`, without a look at the rows: the MD5 is version and digest."""
        version = self._version(key)
        return None if version is None else Held(version, version)

    def listed(self, hour: Window) -> Iterator[tuple[str, str]]:
        """Names and MD5 of every file on the day of `hour`."""
        start = file_name(self._prefix, hour).removesuffix(f"{hour.start:%H}.csv")
        with _translated(self._root):
            paths = [path for path in self._root.glob("*.csv") if path.name.startswith(start)]
            names = sorted(path.name for path in paths if path.is_file())
        for name in names:
            if version := self._version(name):
                yield name, version

    def read(self, key: str, version: str) -> Iterator[Mapping[str, str]]:
        """The rows of that version. Raises Conflict when another one is there."""
        self._check(key, version)
        yield from self._rows(key)
        self._check(key, version)

    def encode(self, partition: str, window: Window, batch: HourFile) -> HourBytes:  # noqa: ARG002 - the port's words
        """The batch is the file already."""
        if self._dry_run:
            name = file_name(self._prefix, window)
            log.info("%s: would be written, %d rows, %d bytes", name, batch.rows, batch.size_bytes)
            self._accounts.waits(window, batch.rows)
        return HourBytes(batch)

    def put(self, key: str, encoded: HourBytes, expected: str | None) -> str:
        """Replace the file durably when it is still the expected one."""
        self._check(key, expected)
        hour, file = encoded.hour, encoded.hour.file
        landed = hour.landed_over(while_readable(self._rows(key)) if expected else ())
        file.seek(0)
        with _translated(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            write_durably(self._root / key, iter(partial(file.read, BLOCK_BYTES), b""))
        self._accounts.landed(hour_of(key), landed)
        log.info("%s: written, %d rows, %d bytes", self._root / key, hour.rows, hour.size_bytes)
        return hour.digest

    def _check(self, key: str, expected: str | None) -> None:
        if self._version(key) != expected:
            raise Conflict(f"{key}: is not the version that was read before", READ_HINT)

    def _version(self, key: str) -> str | None:
        digest = md5(usedforsecurity=False)
        with _translated(self._root):
            try:
                with (self._root / key).open("rb") as file:
                    while block := file.read(BLOCK_BYTES):
                        digest.update(block)
            except FileNotFoundError:
                return None
        return digest.hexdigest()

    def _rows(self, key: str) -> Iterator[Mapping[str, str]]:
        with _translated(self._root), (self._root / key).open("rb") as file, readable(key):
            yield from read_file(lines_in(file), escaped=self._escaped)


@contextmanager
def _translated(root: Path) -> Iterator[None]:
    try:
        yield
    except IsADirectoryError as error:
        raise Permanent(f"{error.filename or root}: is a directory", "move it away: the file has its name") from error
    except OSError as error:
        raise Permanent(
            f"{root}: {error.strerror or error}", "make DATA_DIR writable, and free space on its disk"
        ) from error
