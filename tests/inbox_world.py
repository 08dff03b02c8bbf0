"""An inbox in a folder of its own, run as the daemon runs it, and a model of the merge that is obviously right."""

import csv
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from app.core.runs import Context, Lease, Report, Stop
from app.csv_inbox.config import InboxConfig, configured
from app.csv_inbox.discovery import InboxPaths, InboxRun
from app.csv_inbox.job import run, undo
from app.csv_inbox.transaction import LoadRecord, loads

Table = tuple[list[str], list[list[str]]]
WORD, FACTOR, OTHER = (1 << 64) - 1, 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93


class Silent:
    """Progress that nobody looks at."""

    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Nothing."""


@dataclass
class World:
    """One inbox. `wait` is 0, so that a run takes no time."""

    folder: Path
    config: InboxConfig

    def drop(self, name: str, content: bytes | str) -> Path:
        path = self.config.watch_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self, *, dry_run: bool = False, stop: Stop | None = None) -> Report:
        return run(self.work(dry_run=dry_run, stop=stop))

    def take(self, name: str, content: bytes | str) -> Report:
        """Drop one file and run."""
        self.drop(name, content)
        return self.run()

    def undo(self, run_id: str, *, dry_run: bool = False) -> Report:
        return undo(self.work(dry_run=dry_run), run_id)

    def work(self, *, dry_run: bool = False, stop: Stop | None = None) -> InboxRun:
        at = datetime.now(UTC)
        lease = Lease("csv_inbox", "test", 1, at + timedelta(hours=1))
        context = Context(uuid4().hex, lease, stop or Stop(), Silent(), dry_run=dry_run)
        return InboxRun(InboxPaths(self.config), context, lambda: datetime.now(UTC))

    @property
    def master(self) -> bytes:
        return self.config.merged_file.read_bytes()

    @property
    def metadata(self) -> Any:
        return json.loads(self.config.metadata_file.read_text(encoding="utf-8"))

    @property
    def loads(self) -> Sequence[LoadRecord]:
        return loads(InboxPaths(self.config).loads, 1000)

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    @property
    def waiting(self) -> list[str]:
        return self.names(self.config.watch_dir)

    @property
    def archived(self) -> list[str]:
        return self.names(self.config.archive_dir)

    @property
    def rejected(self) -> list[str]:
        return self.names(self.config.rejected_dir)

    def reason(self, name: str) -> Any:
        return json.loads((self.config.rejected_dir / f"{name}.reason.json").read_text(encoding="utf-8"))


def world(folder: Path, **keys: Any) -> World:
    """An inbox with these keys, without waiting, and with an index however small the master is."""
    given = {"checksum_wait_seconds": 0, "key_column": "k", "index_from_mb": 0, **keys}
    return World(folder, configured(given, folder, ""))


def parsed(content: bytes, delimiter: str = ",", encoding: str = "utf-8") -> Table:
    text = content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    return rows[0], rows[1:]


def model(master: Table | None, incoming: Table, key: str, required: Sequence[str] = ()) -> Table:
    """The merge in the plainest words: dictionaries by column name, nothing clever."""
    names, rows = incoming
    new: dict[str, dict[str, str]] = {}
    for row in rows:
        record = dict(zip(names, row, strict=True))
        new.pop(record[key], None)
        new[record[key]] = record
    if master is None:
        return names, [[record[name] for name in names] for record in new.values()]
    old_names, old_rows = master
    kept = [dict(zip(old_names, row, strict=True)) for row in old_rows]
    records = [record for record in kept if record[key] not in new] + list(new.values())
    columns = old_names + [name for name in names if name not in old_names]
    columns = [
        name
        for name in columns
        if name in names or name == key or name in required or any(record.get(name, "") for record in records)
    ]
    return columns, [[record.get(name, "") for name in columns] for record in records]


def colliding(count: int, seed: int = 0) -> list[bytes]:
    """Keys of 16 letters of latin-1 whose hashes are one: the second word takes back what the first one did."""
    chance = random.Random(7 + seed)  # noqa: S311 - a fixed seed
    letters = [byte for byte in range(0x30, 0x100) if not 0x7F <= byte <= 0xA0]
    begun = (16 + (seed << 32)) * OTHER & WORD

    def mixed(word: int) -> int:
        found = (begun ^ word) * FACTOR & WORD
        return found ^ found >> 32

    found: list[bytes] = []
    target = 0
    while len(found) < count:
        first = bytes(chance.choices(letters, k=8))
        after = mixed(int.from_bytes(first, "little"))
        if not found:
            target = after ^ int.from_bytes(bytes(chance.choices(letters, k=8)), "little")
        second = (after ^ target).to_bytes(8, "little")
        if all(byte in letters for byte in second):
            found.append(first + second)
    return found
