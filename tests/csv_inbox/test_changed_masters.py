"""Masters that somebody edited, touched, moved or cut between the runs or during one; and what an upgrade removes."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from app.core.errors import Permanent, Transient
from app.csv_inbox.discovery import InboxRun
from app.csv_inbox.job import run
from inbox_world import World, colliding, world

ROWS = 500


def begun(folder: Path) -> World:
    here = world(folder)
    here.take("0.csv", "k,a\n" + "".join(f"{n},old\n" for n in range(ROWS)))
    return here


def overwritten(path: Path, at: int, data: bytes) -> None:
    """In place, and so that size, inode and time tell nothing."""
    held = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    os.utime(path, ns=(held.st_atime_ns, held.st_mtime_ns))


def touched(here: World) -> None:
    os.utime(here.config.merged_file)


def moved(here: World) -> None:
    held = here.config.merged_file.stat()
    copy = here.folder / "copy"
    copy.write_bytes(here.master)
    os.utime(copy, ns=(held.st_atime_ns, held.st_mtime_ns))
    copy.replace(here.config.merged_file)


def longer(here: World) -> None:
    with here.config.merged_file.open("ab") as file:
        file.write(b"by hand,old\n")


def test_a_fault_in_a_master_that_was_touched_moved_or_edited_stops_the_merge(
    tmp_path: Path,
) -> None:
    for number, change in enumerate((touched, moved, longer)):
        here = begun(tmp_path / str(number))
        at = here.master.index(b"250,old")
        overwritten(here.config.merged_file, at, b"250,o,d")
        change(here)
        here.drop("1.csv", "k,a\n7,new\n")
        with pytest.raises(Permanent, match="line 252: 3 fields"):
            here.run()
        overwritten(here.config.merged_file, at, b"250,old")
        here.run()
        assert here.master.endswith(b"7,new\n")
        assert here.master.count(b"\n7,") == 1


def test_another_key_column_holds_from_the_next_merge_on(tmp_path: Path) -> None:
    begun(tmp_path)
    other = world(tmp_path, key_column="a")
    other.take("1.csv", "k,a\nx,old\n")
    assert other.master == b"k,a\nx,old\n"


@pytest.mark.parametrize("value", ["v", ""])
def test_a_column_that_a_file_lacks_stays_while_any_row_of_the_master_has_a_value_in_it(
    tmp_path: Path, value: str
) -> None:
    here = world(tmp_path)
    rows = "".join(f"{n},1,{value if n == ROWS - 1 else ''}\n" for n in range(ROWS))
    here.take("0.csv", f"k,a,b\n{rows}")
    here.take("1.csv", "k,a\n7,2\n")
    assert here.loads[0].columns_removed == (() if value else ("b",))
    assert here.master.endswith(b"\n499,1,v\n7,2,\n" if value else b"\n499,1\n7,2\n")


def test_an_index_that_an_earlier_version_left_is_removed(tmp_path: Path) -> None:
    here = begun(tmp_path)
    index = tmp_path / ".final_clusters_data.csv.index"
    index.write_bytes(bytes(4096))
    here.run()
    assert not index.exists()
    assert here.master.endswith(b"499,old\n")


def test_keys_that_share_a_hash_are_merged_each_by_itself(tmp_path: Path) -> None:
    keys = [key.decode("latin-1") for key in colliding(4)]
    here = world(tmp_path, csv_encoding="latin-1")
    here.take("1.csv", "".join(["k,a\n", *(f"{key},1\n" for key in keys[:3])]).encode("latin-1"))
    for _ in range(2):  # and again after an undo
        here.take("2.csv", f"k,a\n{keys[1]},2\n{keys[3]},2\n{keys[1]},3\n".encode("latin-1"))
        lines = [f"{keys[0]},1", f"{keys[2]},1", f"{keys[3]},2", f"{keys[1]},3"]
        assert here.master.decode("latin-1").splitlines() == ["k,a", *lines]
        assert (here.loads[0].inserted, here.loads[0].replaced, here.loads[0].duplicates) == (1, 1, 1)
        here.undo(here.loads[0].run_id)


@pytest.mark.parametrize("edited", [b"\n\nk,a", b"\xef\xbb\xbf\nk,a", b'"k",a', b"\r\nk,a\r\nx,1"])
def test_a_master_that_somebody_left_without_rows_or_a_last_line_end_comes_back_as_it_was(
    tmp_path: Path, edited: bytes
) -> None:
    here = world(tmp_path)
    here.config.merged_file.write_bytes(edited)
    here.take("1.csv", "k,a\ny,2\n")
    assert here.master.startswith(edited)
    here.undo(here.loads[0].run_id)
    assert here.master == edited


class Meddling:
    """Progress that somebody else uses to write into the master."""

    def __init__(self, change: Callable[[], None]) -> None:
        self._change = change

    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Change it once the master was looked at."""
        if done:
            self._change()


def test_a_master_that_is_cut_while_it_is_read_is_left_as_it_is(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a\n" + "".join(f"{n},{'x' * 100}\n" for n in range(40_000)))
    here.drop("1.csv", "k,a\n39999,new\n")
    work = here.work()
    cut = here.master[: len(here.master) // 2]
    cutting = Meddling(lambda: os.truncate(here.config.merged_file, len(cut)))
    with pytest.raises((Permanent, Transient), match="master"):
        run(InboxRun(work.paths, replace(work.context, progress=cutting), work.clock))
    assert here.master == cut
    assert here.waiting == ["1.csv"]
    assert not [name for name in here.names(tmp_path) if ".tmp" in name]
