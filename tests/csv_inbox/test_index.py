"""The index: used for the very master that it was made for, and never believed. And masters that somebody edited."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from app.core.errors import Permanent, Transient
from app.csv_inbox.discovery import InboxPaths, InboxRun
from app.csv_inbox.job import run
from app.csv_inbox.key_index import HEAD_BYTES
from inbox_world import World, colliding, world

ROWS = 500


def begun(folder: Path) -> World:
    here = world(folder)
    here.take("0.csv", "k,a\n" + "".join(f"{n},old\n" for n in range(ROWS)))
    assert InboxPaths(here.config).index.exists()
    return here


def overwritten(path: Path, at: int, data: bytes) -> None:
    """In place, and so that size, inode and time tell nothing."""
    held = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    os.utime(path, ns=(held.st_atime_ns, held.st_mtime_ns))


def test_rows_that_are_not_pointed_to_are_not_read(tmp_path: Path) -> None:
    here = begun(tmp_path)
    overwritten(here.config.merged_file, here.master.index(b"250,old"), b"250,o,d")  # the whole pass would refuse it
    here.take("1.csv", "k,a\n7,new\n499,new\nmore,new\n")
    expected = b"k,a\n" + b"".join(b"%d,old\n" % n for n in range(ROWS) if n not in (7, 499))
    assert here.master == expected.replace(b"250,old", b"250,o,d") + b"7,new\n499,new\nmore,new\n"
    load = here.loads[0]
    assert (load.inserted, load.replaced, load.rows_before, load.rows_after) == (1, 2, ROWS, ROWS + 1)
    here.undo(load.run_id)
    assert here.master == b"k,a\n" + b"".join(b"%d,old\n" % n for n in range(ROWS)).replace(b"250,old", b"250,o,d")


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


def test_a_master_that_was_touched_moved_or_edited_is_read_whole(tmp_path: Path) -> None:
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


def torn(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def flipped(path: Path) -> None:
    """Makes the index forget a key, at its other end."""
    overwritten(path, path.stat().st_size - 12, b"\1")


def headless(path: Path) -> None:
    overwritten(path, 0, bytes(HEAD_BYTES))


def nonsense(path: Path) -> None:
    path.write_bytes(b"[1]")


def another(path: Path) -> None:
    """Hash and length of the first two entries change places."""
    data = path.read_bytes()
    overwritten(path, HEAD_BYTES, data[HEAD_BYTES + 12 : HEAD_BYTES + 24] + data[HEAD_BYTES : HEAD_BYTES + 12])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [torn, flipped, headless, nonsense, another, empty, gone])
def test_a_damaged_index_is_worth_nothing_and_is_made_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    here = begun(tmp_path)
    index = InboxPaths(here.config).index
    damage(index)
    here.take("1.csv", "k,a\n0,new\n499,new\n")
    assert here.master == b"k,a\n" + b"".join(b"%d,old\n" % n for n in range(1, 499)) + b"0,new\n499,new\n"
    assert (here.loads[0].replaced, here.loads[0].rows_after) == (2, ROWS)
    here.undo(here.loads[0].run_id)
    assert here.master == b"k,a\n" + b"".join(b"%d,old\n" % n for n in range(ROWS))
    here.take("2.csv", "k,a\n1,new\n")
    overwritten(here.config.merged_file, here.master.index(b"250,old"), b"250,o,d")
    here.take("3.csv", "k,a\n2,new\n")  # the new one is used
    assert here.master.endswith(b"1,new\n2,new\n")


def test_an_index_of_another_key_column_is_not_used(tmp_path: Path) -> None:
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


def test_a_small_master_has_no_index(tmp_path: Path) -> None:
    here = world(tmp_path, index_from_mb=16)
    here.take("1.csv", "k,a\nx,old\n")
    assert not InboxPaths(here.config).index.exists()


def test_keys_that_share_a_hash_are_merged_each_by_itself(tmp_path: Path) -> None:
    keys = [key.decode("latin-1") for key in colliding(4)]
    here = world(tmp_path, csv_encoding="latin-1")
    here.take("1.csv", "".join(["k,a\n", *(f"{key},1\n" for key in keys[:3])]).encode("latin-1"))
    for _ in range(2):  # along the index, and without
        here.take("2.csv", f"k,a\n{keys[1]},2\n{keys[3]},2\n{keys[1]},3\n".encode("latin-1"))
        lines = [f"{keys[0]},1", f"{keys[2]},1", f"{keys[3]},2", f"{keys[1]},3"]
        assert here.master.decode("latin-1").splitlines() == ["k,a", *lines]
        assert (here.loads[0].inserted, here.loads[0].replaced, here.loads[0].duplicates) == (1, 1, 1)
        here.undo(here.loads[0].run_id)


def test_a_file_whose_keys_share_a_hash_uses_no_index_and_a_later_file_makes_it_anew(tmp_path: Path) -> None:
    first, second = (key.decode("latin-1") for key in colliding(2))
    here = world(tmp_path, csv_encoding="latin-1")
    rows = "".join(f"{n},old\n" for n in range(ROWS))
    here.take("0.csv", f"k,a\n{first},old\n{rows}".encode("latin-1"))
    here.take("1.csv", f"k,a\n{first},new\n{second},new\n7,new\n".encode("latin-1"))
    assert (here.loads[0].inserted, here.loads[0].replaced) == (1, 2)
    here.take("2.csv", f"k,a\n{second},newer\n".encode("latin-1"))
    overwritten(here.config.merged_file, here.master.index(b"250,old"), b"250,o,d")
    here.take("3.csv", "k,a\n8,new\n")  # the index of the merge before it is used
    kept = rows.replace("7,old\n", "", 1).replace("8,old\n", "", 1).replace("250,old", "250,o,d")
    assert here.master.decode("latin-1") == f"k,a\n{kept}{first},new\n7,new\n{second},newer\n8,new\n"


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
