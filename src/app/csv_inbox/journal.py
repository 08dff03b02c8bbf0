"""One merge, or one undo, is one step: the journal is its commit, and recovery carries out what was committed.

Order: everything new is on the disk under temporary names, and the archive holds the input by a pending link, before
the journal appears by an atomic rename. From then on the step has happened; what is left to do are renames that can be
repeated. Without a journal nothing has happened, and every temporary file goes. fsync is never retried.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.core.errors import Permanent
from app.core.files import bounded_name, sync_directory, write_durably
from app.csv_inbox.faults import Stuck, Unmergeable, Unsteady
from app.csv_inbox.history import Load, load_of, prune, save_load
from app.csv_inbox.identity import Identity, identity_of, md5_of, open_regular
from app.csv_inbox.places import Places

VERSION = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Renaming:
    """A temporary file that takes its final name. `inode` tells whether that was done already."""

    temporary: Path
    target: Path
    inode: int


@dataclass(frozen=True, slots=True)
class Archiving:
    """The input's way from the inbox to the archive. `digest` is the MD5 of what was merged."""

    pending: Path
    target: Path
    source: Path
    identity: Identity
    digest: str


@dataclass(frozen=True, slots=True)
class Step:
    """Everything that is left to do once it is committed."""

    renamings: Sequence[Renaming]
    removals: Sequence[Path]
    archiving: Archiving | None
    load: Load


def renaming(temporary: Path, target: Path) -> Renaming:
    """The renaming of a file that is complete now."""
    return Renaming(temporary, target, temporary.stat().st_ino)


def commit(places: Places, step: Step) -> None:
    """Make the step happen: once this returns, it has. Raises OSError; then it has not."""
    folders = {each.temporary.parent for each in step.renamings}
    if step.archiving:
        folders.add(step.archiving.pending.parent)
    for folder in folders:
        sync_directory(folder)
    write_durably(places.journal, [json.dumps(_plain(step, places.folder), indent=1).encode("ascii")])


def carry_out(places: Places, step: Step) -> None:
    """Do what the step says; what is done already is skipped, so it can be repeated after any crash."""
    for each in step.renamings:
        _rename(each)
    for path in step.removals:
        path.unlink(missing_ok=True)
    _sync({path.parent for path in (*(each.target for each in step.renamings), *step.removals)})
    if step.archiving:
        _archive(step.archiving)
    save_load(places.loads, step.load)
    prune(places.loads, places.config.undo_keep)
    places.journal.unlink()
    sync_directory(places.folder)


def _rename(each: Renaming) -> None:
    if each.temporary.exists():
        each.temporary.replace(each.target)
        log.debug("renamed %s to %s", each.temporary.name, each.target)
    elif not each.target.exists() or each.target.stat().st_ino != each.inode:
        raise Permanent(
            f"a committed step cannot be completed: {each.temporary.name} is gone, {each.target.name} is another file",
            "put both back as they were, or remove the merge journal beside the master if the master is right as it is",
        )


def _archive(each: Archiving) -> None:
    """The link gets its archive name; the inbox's name goes unless it leads to anything else by now.

    Rows that were appended since the file was read go with it: they are found in the archive and taken in as a file of
    their own. A file that was rewritten stays in the inbox, and is merged and archived as it is then.
    """
    merged = _is_merged(each)
    if each.pending.exists() and (merged or _inode(each.pending) != _inode(each.source)):
        each.pending.rename(each.target)
        log.debug("archived %s as %s", each.source.name, each.target)
    if os.path.lexists(each.target) and merged:
        each.source.unlink(missing_ok=True)
    each.pending.unlink(missing_ok=True)
    _sync({each.target.parent, each.source.parent})


def _is_merged(each: Archiving) -> bool:
    """True while the inbox's name leads to the file that was merged, or to that file with more behind it."""
    try:
        found = identity_of(each.source.lstat())
    except FileNotFoundError:
        return False
    if found == each.identity:
        return True
    held = each.identity
    linked = found.inode == held.inode and found.inode in (_inode(each.pending), _inode(each.target))
    if not linked or found.size <= held.size:
        return False
    try:
        with open_regular(each.source) as file:
            return md5_of(file, held.size) == each.digest
    except (Unmergeable, Unsteady, Stuck) as error:
        log.warning("%s stays in the inbox: %s", each.source.name, error.message)
        return False


def _inode(path: Path) -> int:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return -1


def _sync(folders: Iterable[Path]) -> None:
    for folder in folders:
        sync_directory(folder)


def recover(places: Places) -> Load | None:
    """Complete what was committed, remove what was not; the load that was completed. Raises Permanent, OSError."""
    step = pending_step(places)
    if step is not None:
        places.loads.mkdir(exist_ok=True)
        carry_out(places, step)
    for path in places.leftovers():
        path.unlink(missing_ok=True)
    return step.load if step else None


def pending_step(places: Places) -> Step | None:
    """What was committed and not completed. Raises Permanent when the journal cannot be read."""
    try:
        content = json.loads(places.journal.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Permanent(
            f"the merge journal {places.journal.name} is damaged: {error}",
            "compare master and metadata with a backup, then remove the journal; nothing was changed",
        ) from error
    return _step(content, places.folder)


def _plain(step: Step, folder: Path) -> Mapping[str, Any]:
    """As JSON; paths relative to the master's folder, so that the whole tree may have moved before the restart."""

    def near(path: Path) -> str:
        return os.path.relpath(path, folder)

    archiving = step.archiving
    return {
        "version": VERSION,
        "renamings": [[near(each.temporary), near(each.target), each.inode] for each in step.renamings],
        "removals": [near(path) for path in step.removals],
        "archiving": archiving
        and {
            "pending": near(archiving.pending),
            "target": near(archiving.target),
            "source": near(archiving.source),
            "identity": asdict(archiving.identity),
            "digest": archiving.digest,
        },
        "load": asdict(step.load),
    }


def _step(content: Mapping[str, Any], folder: Path) -> Step:
    archiving = content["archiving"]
    return Step(
        [Renaming(folder / temporary, folder / target, inode) for temporary, target, inode in content["renamings"]],
        [folder / path for path in content["removals"]],
        archiving
        and Archiving(
            folder / archiving["pending"],
            _bounded(folder / archiving["target"]),
            folder / archiving["source"],
            Identity(**archiving["identity"]),
            archiving["digest"],
        ),
        load_of(content["load"]),
    )


def _bounded(target: Path) -> Path:
    """The archive name. Earlier versions committed names too long for a directory."""
    return target.with_name(bounded_name(target.name))
