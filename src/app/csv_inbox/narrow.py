"""A master written anew without columns that have become obsolete.

Invariant: every other field, and every line end, is as it was to the byte.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from app.core.files import keep_mode, sync_file
from app.csv_inbox.dialect import Dialect
from app.csv_inbox.header import read_header
from app.csv_inbox.layout import Layout
from app.csv_inbox.output import Beat, Output
from app.csv_inbox.records import blocks


def narrowed(path: Path, layout: Layout, dropped: Sequence[int], dialect: Dialect, beat: Beat) -> os.stat_result:
    """Replace the file, durably, by itself without the columns `dropped`. Raises OSError."""
    second = path.with_name(f"{path.name}.2.tmp")
    d, keep = dialect.delimiter.encode(), [at for at in range(len(layout.names)) if at not in frozenset(dropped)]
    with path.open("rb", buffering=0) as file, second.open("xb", buffering=0) as narrow:
        keep_mode(path, narrow.fileno())
        out = Output(narrow, None, None, beat)
        out.write(layout.header(dialect, dropped))
        header = read_header(file.read, dialect)
        file.seek(header.size_bytes)
        for block in blocks(file.read, dialect, 1):
            beat(0)
            lines = []
            for position in block.rows.tolist():
                fields = dialect.fields(block.record(position))
                stop, end = int(block.stops[position]), int(block.ends[position])
                lines.append(d.join([fields[at] for at in keep]) + block.data[stop:end])
            out.write(b"".join(lines))
        sync_file(narrow.fileno())
        after = os.fstat(narrow.fileno())
    second.replace(path)
    return after
