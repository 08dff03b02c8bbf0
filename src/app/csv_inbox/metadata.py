"""The metadata file beside the master: when, how many rows, which columns.

Invariant: it has exactly the documented keys, and it is replaced in the same committed step as the master.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from app.core.files import sync_file


def write_metadata(temporary: Path, columns: Sequence[str], rows: int, at: datetime) -> None:
    """Write the metadata durably to a temporary file. `last_updated`: UTC, as documented, without an offset."""
    content = {
        "last_updated": at.replace(tzinfo=None).isoformat(timespec="microseconds"),
        "row_count": rows,
        "column_count": len(columns),
        "columns": list(columns),
    }
    with temporary.open("x", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        sync_file(file.fileno())
