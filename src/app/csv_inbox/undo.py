"""Taking merges back, newest first, each as one committed step: the master becomes what it was, to the byte.

Invariant: nothing is written over a master that is not what the last merge left; what was archived stays archived.
"""

import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from app.core.errors import Rejected
from app.core.files import keep_mode, sync_file
from app.csv_inbox.config import InboxConfig
from app.csv_inbox.csv_tokenizer import Dialect, blocks
from app.csv_inbox.discovery import Places, link_or_copy
from app.csv_inbox.header import read_header
from app.csv_inbox.master_output import COPY_BYTES, write_metadata
from app.csv_inbox.quarantine import KEPT_LOADS, MERGED, Load, loads, revert_file, undone
from app.csv_inbox.transaction import Step, carry_out, commit, renaming

LEAST_CHARACTERS = 4


def to_undo(places: Places, run_id: str) -> Sequence[Load]:
    """The merges of a run and all later ones, newest first. `run_id` may be its beginning. Raises Rejected."""
    merged = [load for load in loads(places.loads, KEPT_LOADS) if load.outcome == MERGED]
    wanted = [place for place, load in enumerate(merged) if load.run_id.startswith(run_id)]
    if not wanted or len(run_id) < LEAST_CHARACTERS:
        told = f"no merge of a run {run_id[:40]!r} is in the history"
        raise Rejected(told, "take the run from: python -m app runs csv_inbox")
    if len({merged[place].run_id for place in wanted}) > 1:
        raise Rejected(f"several runs begin with {run_id!r}", "give more of the run's id")
    taken = merged[: wanted[-1] + 1]
    kept = places.config.undo_keep
    gone = next((load for load in taken if not revert_file(places.loads, load.load_id).exists()), None)
    if gone is not None:
        hint = f"only the last undo_keep={kept} merges can be taken back; drop corrected rows into the inbox instead"
        raise Rejected(f"the merge of {gone.file} at {gone.at} cannot be undone any more", hint)
    return taken


def preview(load: Load) -> str:
    """What taking this merge back does."""
    return (
        f"{load.file}, merged {load.at}: {load.inserted} inserted rows go, {load.replaced + load.unchanged} rows come "
        f"back as they were; {load.rows_after} rows become {load.rows_before}"
    )


@dataclass(frozen=True, slots=True)
class Undoing:
    """What undoing works on. `beat` is told of bytes written and may stop it before the commit."""

    places: Places
    at: datetime
    beat: Callable[[int], None]


def undo(undoing: Undoing, load: Load) -> None:
    """Take one merge back, the newest. Raises Rejected when the master was changed since, and OSError."""
    places = undoing.places
    config = places.config
    check_master(config, load)
    if load.revert == "first":
        step = Step([], [config.merged_file, config.metadata_file, _revert(places, load)], None, undone(load))
    else:
        restored = places.temporary(load.load_id, "restored")
        metadata = places.temporary_metadata(load.load_id)
        if load.revert == "whole":
            link_or_copy(_revert(places, load), restored)
        else:
            _splice(undoing, load, restored)
        columns, rows = _described(restored, config)
        write_metadata(metadata, columns, rows, undoing.at)
        renamings = [renaming(restored, config.merged_file), renaming(metadata, config.metadata_file)]
        step = Step(renamings, [_revert(places, load)], None, undone(load))
    check_master(config, load)  # nobody who takes no lock wrote to it while it was read
    commit(places, step)
    carry_out(places, step)


def check_master(config: InboxConfig, load: Load) -> None:
    """Raises Rejected unless the master is as this merge left it: of that size, and not written to since."""
    try:
        there = config.merged_file.stat()
    except FileNotFoundError:
        there = None
    if there is None or (there.st_size, there.st_mtime_ns) != (load.size_bytes, load.mtime_ns):
        raise Rejected(
            f"{config.merged_file.name} was changed by something else since {load.file} was merged",
            "put back the file as the merge left it; undoing would destroy what was done since",
        )


def _revert(places: Places, load: Load) -> Path:
    return revert_file(places.loads, load.load_id)


def _splice(undoing: Undoing, load: Load, restored: Path) -> None:
    """The kept bytes of the master with the removed ranges back in their places."""
    config = undoing.places.config
    with (
        config.merged_file.open("rb", buffering=0) as master,
        _revert(undoing.places, load).open("rb", buffering=0) as removed,
        restored.open("xb") as out,
    ):
        keep_mode(config.merged_file, out.fileno())
        ranges = _ranges(removed, load.ranges)
        at = 0
        for offset, length in zip(ranges[0::2], ranges[1::2], strict=True):
            _copy(master, out, offset - at, undoing.beat)
            _copy(removed, out, length, undoing.beat)
            at = offset + length
        _copy(master, out, load.kept_bytes - master.tell(), undoing.beat)
        out.flush()
        # As it was in this as well: the merge before tells its master by size and time.
        os.utime(out.fileno(), ns=(load.mtime_before_ns, load.mtime_before_ns))
        sync_file(out.fileno())


def _ranges(removed: IO[bytes], count: int) -> "array[int]":
    ranges = array("q")
    size = 2 * count * ranges.itemsize
    removed.seek(-size, os.SEEK_END)
    ranges.frombytes(removed.read(size))
    removed.seek(0)
    return ranges


def _copy(source: IO[bytes], out: IO[bytes], size: int, beat: Callable[[int], None]) -> None:
    while size > 0:
        piece = source.read(min(size, COPY_BYTES))
        if not piece:
            raise Rejected("what was kept of the master is incomplete", "restore the master from a backup instead")
        out.write(piece)
        beat(len(piece))
        size -= len(piece)


def _described(path: Path, config: InboxConfig) -> tuple[Sequence[str], int]:
    """Columns and number of rows."""
    dialect = Dialect(config.csv_delimiter, config.csv_encoding)
    with path.open("rb", buffering=0) as file:
        header = read_header(file.read, dialect)
        file.seek(header.size_bytes)
        return header.names, sum(len(block.rows) for block in blocks(file.read, dialect, 1))
