"""What lies in the inbox: which files are candidates, in which order, and whether they are still being written.

Invariant: a file is taken only when size, modification time and MD5 stayed the same over the waiting time; links,
pipes and devices are never opened.
"""

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.csv_inbox.config import InboxConfig
from app.csv_inbox.faults import NOT_REGULAR, Fault, Unmergeable, Unsteady
from app.csv_inbox.identity import Identity, identity_of, open_regular, read_some

SUFFIX = ".csv"
CHUNK_BYTES = MEGABYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Candidate:
    """A name in the inbox that ends in .csv. `refused` says why it can never be merged, empty when it may be.

    `md5` is that of before the waiting time, "" when it was not taken.
    """

    path: Path
    identity: Identity
    refused: str = ""
    md5: str = ""


def candidates(config: InboxConfig) -> Sequence[Candidate]:
    """Oldest first by modification time, then by name; hidden names are left alone. Raises OSError."""
    try:
        entries = [Path(entry.path) for entry in os.scandir(config.watch_dir) if _named(entry.name)]
    except FileNotFoundError:
        return []
    found = [each for each in map(candidate, entries) if each is not None and each.path != config.merged_file]
    return in_order(found)


def in_order(found: Sequence[Candidate]) -> Sequence[Candidate]:
    """Oldest first by modification time, then by name."""
    return sorted(found, key=lambda each: (each.identity.mtime_ns, each.path.name))


def _named(name: str) -> bool:
    return name.lower().endswith(SUFFIX) and not name.startswith(".")


def candidate(path: Path) -> Candidate | None:
    """What has this name; None for a folder and for what is gone by now."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        return None
    refused = ""
    if stat.S_ISLNK(found.st_mode):
        refused = "it is a symbolic link"
    elif not stat.S_ISREG(found.st_mode):
        refused = "it is no regular file"
    return Candidate(path, identity_of(found), refused)


def is_too_large(size_bytes: int, config: InboxConfig) -> bool:
    """Above what the configuration allows."""
    return size_bytes > config.max_file_size_mb * MEGABYTE


def unchanged(before: Candidate) -> bool:
    """True while the name leads to the same file in the same state."""
    try:
        return identity_of(before.path.lstat()) == before.identity
    except FileNotFoundError:
        return False


def fingerprint(candidate: Candidate) -> str:
    """The MD5 of the file now. Raises Unmergeable (cannot be opened), Unsteady (gone) and Stuck (cannot be read)."""
    with open_regular(candidate.path) as file:
        digest = hashlib.md5(usedforsecurity=False)
        while piece := read_some(file, CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def check_steady(candidate: Candidate, now: str) -> None:
    """Raises Unsteady when the MD5 is not what it was before the waiting time."""
    if candidate.md5 and candidate.md5 != now:
        raise Unsteady(f"{candidate.path.name} changed under its name", "no action needed; the next run looks again")


def refusal(candidate: Candidate) -> Unmergeable:
    """Why the candidate can never be merged."""
    hint = "put the file itself into the inbox, not a link, a pipe or a device"
    return Unmergeable([Fault(candidate.refused)], hint, kind=NOT_REGULAR)
