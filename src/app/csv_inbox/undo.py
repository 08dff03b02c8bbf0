"""Taking merges back, newest first, each as one committed transaction: the master becomes what it was, to the byte.

Invariant: nothing is written over a master that is not what the last merge left; what was archived stays archived.
"""

import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import IO

from app.core.errors import Rejected
from app.core.files import keep_mode, sync_file
from app.csv_inbox.config import InboxConfig
from app.csv_inbox.csv_tokenizer import Dialect, blocks
from app.csv_inbox.discovery import MEBIBYTE, InboxPaths, link_or_copy
from app.csv_inbox.header import read_header
from app.csv_inbox.quarantine import MERGED, UNDONE, LoadRecord, loads, revert_file
from app.csv_inbox.transaction import Transaction, carry_out, commit, renaming, write_metadata

LEAST_CHARACTERS = 4


def to_undo(paths: InboxPaths, run_id: str) -> Sequence[LoadRecord]:
    """The merges of a run and all later ones, newest first. `run_id` may be its beginning. Raises Rejected."""
    merged = [load for load in loads(paths.loads) if load.outcome == MERGED]
    wanted = [place for place, load in enumerate(merged) if load.run_id.startswith(run_id)]
    if not wanted or len(run_id) < LEAST_CHARACTERS:
        told = f"no merge of a run {run_id[:40]!r} is in the history"
        raise Rejected(told, "take the run from: python -m app runs csv_inbox")
    if len({merged[place].run_id for place in wanted}) > 1:
        raise Rejected(f"several runs begin with {run_id!r}", "give more of the run's id")
    taken = merged[: wanted[-1] + 1]
    gone = next((load for load in taken if not revert_file(paths.loads, load.load_id).exists()), None)
    if gone is not None:
        kept = paths.config.undo_keep
        hint = f"only the last undo_keep={kept} merges can be taken back; drop corrected rows into the inbox instead"
        raise Rejected(f"the merge of {gone.file} at {gone.at} cannot be undone any more", hint)
    return taken


def preview(load: LoadRecord) -> str:
    """What taking this merge back does."""
    return (
        f"{load.file}, merged {load.at}: {load.inserted} inserted rows go, {load.replaced + load.unchanged} rows come "
        f"back as they were; {load.rows_after} rows become {load.rows_before}"
    )


def take_back(paths: InboxPaths, load: LoadRecord, at: datetime, beat: Callable[[int], None]) -> None:
    """Take one merge back, the newest; `beat` is told of bytes written and may stop it before the commit.

    Raises Rejected when the master was changed since, and OSError.
    """
    config = paths.config
    check_master(config, load)
    removed = revert_file(paths.loads, load.load_id)
    renamings, removals = [], [removed]
    if load.revert == "first":
        removals = [config.merged_file, config.metadata_file, removed]
    else:
        restored = paths.temporary(load.load_id, "restored")
        metadata = paths.temporary_metadata(load.load_id)
        if load.revert == "whole":
            link_or_copy(removed, restored)
        else:
            _splice(config, load, removed, restored, beat)
        dialect = Dialect(config.csv_delimiter, config.csv_encoding)
        with restored.open("rb", buffering=0) as file:
            header = read_header(file.read, dialect)
            file.seek(header.size_bytes)
            rows = sum(len(block.rows) for block in blocks(file.read, dialect, 1))
        write_metadata(metadata, header.names, rows, at)
        renamings = [renaming(restored, config.merged_file), renaming(metadata, config.metadata_file)]
    transaction = Transaction(renamings, removals, None, replace(load, outcome=UNDONE, revert=""))
    check_master(config, load)  # nobody who takes no lock wrote to it while it was read
    commit(paths, transaction)
    carry_out(paths, transaction)


def check_master(config: InboxConfig, load: LoadRecord) -> None:
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


def _splice(config: InboxConfig, load: LoadRecord, kept: Path, restored: Path, beat: Callable[[int], None]) -> None:
    """The kept bytes of the master with the removed rows back in their places; the ranges follow these in `kept`."""
    with (
        config.merged_file.open("rb", buffering=0) as master,
        kept.open("rb", buffering=0) as removed,
        restored.open("xb") as out,
    ):
        keep_mode(config.merged_file, out.fileno())
        ranges = array("q")
        size = 2 * load.ranges * ranges.itemsize
        removed.seek(-size, os.SEEK_END)
        ranges.frombytes(removed.read(size))
        removed.seek(0)
        at = 0
        for offset, length in zip(ranges[0::2], ranges[1::2], strict=True):
            _copy(master, out, offset - at, beat)
            _copy(removed, out, length, beat)
            at = offset + length
        _copy(master, out, load.kept_bytes - master.tell(), beat)
        out.flush()
        # As it was in this as well: the merge before tells its master by size and time.
        os.utime(out.fileno(), ns=(load.mtime_before_ns, load.mtime_before_ns))
        sync_file(out.fileno())


def _copy(source: IO[bytes], out: IO[bytes], size: int, beat: Callable[[int], None]) -> None:
    while size > 0:
        piece = source.read(min(size, MEBIBYTE))
        if not piece:
            raise Rejected("what was kept of the master is incomplete", "restore the master from a backup instead")
        out.write(piece)
        beat(len(piece))
        size -= len(piece)
