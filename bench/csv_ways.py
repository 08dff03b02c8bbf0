"""One merge of one file into one master, one way, in its own process: `csv_ways.py WAY FOLDER [FILE]`."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

PIECE_BYTES = 1 << 18
"""Larger writes can take the kernel ten times as long, which would flatter whatever is measured beside the copy."""


def headwater(folder: Path) -> None:
    """Ours, the whole step: checks, MD5, spool, merge, undo data, fsync, journal, archive."""
    from app.core.runs import Context, Lease, Stop
    from app.csv_inbox.config import configured
    from app.csv_inbox.discovery import InboxPaths, InboxRun
    from app.csv_inbox.job import run

    class Silent:
        def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
            """Nobody looks."""

    keys = {"checksum_wait_seconds": 0, "key_column": "k", "merged_file": "master.csv"}
    config = configured(keys, folder, "")
    lease = Lease("csv_inbox", "bench", 1, datetime.now(UTC))
    work = InboxRun(InboxPaths(config), Context(uuid4().hex, lease, Stop(), Silent()), lambda: datetime.now(UTC))
    config.watch_dir.mkdir(exist_ok=True)
    shutil.copy(folder / (sys.argv[3] if len(sys.argv) > 3 else "incoming.csv"), config.watch_dir / "incoming.csv")
    report = run(work)
    if report.failures:
        sys.exit(str(report.failures))


def floor(folder: Path) -> None:
    """What a merge along an index cannot do without: our imports, the MD5 of the file, master and index read and
    written, fsync. Nothing is decided, no row of the file is looked at, and nothing is kept to undo it.
    """
    import hashlib
    import zlib

    hashlib.md5((folder / "incoming.csv").read_bytes(), usedforsecurity=False)
    with (folder / ".master.csv.index").open("rb", 0) as source, (folder / "out.index").open("wb", 0) as out:
        while piece := source.read(PIECE_BYTES):
            zlib.crc32(piece)
            out.write(piece)
            zlib.crc32(piece)
    copy(folder)
    with (folder / "out.csv").open("rb") as written:
        os.fsync(written.fileno())


def copy(folder: Path) -> None:
    """The measure of the goals: read and write the bytes."""
    with (folder / "master.csv").open("rb", 0) as source, (folder / "out.csv").open("wb", 0) as out:
        while piece := source.read(PIECE_BYTES):
            out.write(piece)


def pandas(folder: Path) -> None:
    """The ordinary way."""
    import pandas as pd

    master, incoming = pd.read_csv(folder / "master.csv"), pd.read_csv(folder / "incoming.csv")
    kept = master[~master["k"].isin(incoming["k"])]
    pd.concat([kept, incoming]).to_csv(folder / "out.csv", index=False)


def polars(folder: Path) -> None:
    """All columns as text, streamed."""
    import polars as pl

    master = pl.scan_csv(folder / "master.csv", infer_schema=False)
    incoming = pl.scan_csv(folder / "incoming.csv", infer_schema=False)
    pl.concat([master.join(incoming, on="k", how="anti"), incoming]).sink_csv(folder / "out.csv")


def duckdb(folder: Path) -> None:
    """All columns as text."""
    import duckdb as db

    master, incoming = (f"read_csv('{folder / name}', all_varchar = true)" for name in ("master.csv", "incoming.csv"))
    db.sql(
        f"COPY (SELECT * FROM {master} m WHERE NOT EXISTS (SELECT 1 FROM {incoming} i WHERE i.k = m.k) "  # noqa: S608 - our paths
        f"UNION ALL SELECT * FROM {incoming}) TO '{folder / 'out.csv'}' (HEADER)"
    )


WAYS: Mapping[str, Callable[[Path], None]] = {
    "headwater": headwater,
    "copy": copy,
    "floor": floor,
    "pandas": pandas,
    "polars": polars,
    "duckdb": duckdb,
}

if __name__ == "__main__":
    WAYS[sys.argv[1]](Path(sys.argv[2]))
