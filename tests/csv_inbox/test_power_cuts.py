"""The order in which a merge reaches the disk, and a disk that fails at any of its steps."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from app.core.errors import Permanent
from app.csv_inbox.discovery import InboxPaths
from disk_effects import Disk, Effect
from inbox_world import World, world

FIRST, SECOND = "k,a,b\nx,1,1\ny,1,1\n", "k,a,b\nx,2,2\nz,2,2\n"
MERGED = b"k,a,b\ny,1,1\nx,2,2\nz,2,2\n"


def merged_once(folder: Path, second: str = SECOND) -> World:
    here = world(folder)
    here.take("1.csv", FIRST)
    here.drop("2.csv", second)
    return here


def merge(here: World) -> None:
    here.run()


def undo(here: World) -> None:
    here.undo(here.loads[0].run_id)


def narrow(here: World) -> None:
    """A column that no row has a value in goes: the new master is written twice."""
    here.take("1.csv", "k,a,b\nx,1,\ny,1,\nz,1,\n")
    here.take("2.csv", "k,a\nx,2\n")
    assert here.master == b"k,a\ny,1\nz,1\nx,2\n"


def late_rows(here: World) -> None:
    path = here.config.archive_dir / here.archived[0]
    with path.open("a") as file:
        file.write("late,1,1\n")
    here.run()


def reject(here: World) -> None:
    here.take("bad.csv", "k,a\nx\n")


@pytest.mark.parametrize("act", [merge, undo, narrow, late_rows, reject])
def test_whatever_happens_no_file_has_its_name_before_its_bytes_are_flushed_and_no_name_stays_unflushed(
    tmp_path: Path, act: Callable[[World], None]
) -> None:
    here, disk = merged_once(tmp_path), Disk(tmp_path)
    with disk.recorded():
        act(here)
    # The index may be lost, and the input is flushed, if at all, by whoever wrote it.
    of_others = {here.config.archive_dir, here.config.rejected_dir}
    index = InboxPaths(here.config).index
    assert {path for path in disk.renamed_unflushed() if path.parent not in of_others} <= {index}
    assert set(disk.unflushed_names()) <= {index}


def test_all_that_a_step_needs_is_on_the_disk_before_its_journal_and_the_journal_goes_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, disk = merged_once(tmp_path), Disk(tmp_path)
    with disk.recorded():
        here.run()
    places, config = InboxPaths(here.config), here.config
    targets = [each.target for each in disk.effects]
    committed, ended = targets.index(places.journal), len(targets) - targets[::-1].index(places.journal) - 1
    before, after = disk.effects[:committed], disk.effects[committed + 1 : ended]
    renamed = [each for each in after if each.what == "rename" and each.path.name.endswith(".merge.tmp")]
    assert {config.merged_file, config.metadata_file} < {each.target for each in renamed}
    flushed = [(each.path, each.size_bytes) for each in before if each.what == "flush"]
    assert {(each.path, each.size_bytes) for each in renamed} < set(flushed)
    assert {each.what for each in before} == {"flush", "link"}
    link = next(at for at, each in enumerate(before) if each.what == "link")
    assert {each.path for each in before[link:]} > {tmp_path, config.archive_dir}, "the names of all that waits"
    assert after[0] == Effect("flush", tmp_path, tmp_path, 0), "the commit"
    named = {tmp_path, config.archive_dir, config.watch_dir, places.loads}
    assert {each.path for each in after[1:] if each.what == "flush"} > named
    assert [each.what for each in disk.effects[ended : ended + 2]] == ["remove", "flush"]
    assert disk.effects[ended + 1].path == tmp_path
    assert [each for each in caplog.records if each.levelname == "WARNING"] == []


def fault_of(here: World) -> str:
    try:
        here.run()
    except Permanent as error:
        return error.message
    return ""


def test_an_fsync_that_fails_at_any_step_is_said_is_not_repeated_and_loses_nothing(tmp_path: Path) -> None:
    for number in count():
        here = merged_once(tmp_path / str(number))
        left = count(-number)
        disk = Disk(tmp_path, broken=lambda _, left=left: next(left) == 0)  # type: ignore[misc]
        with disk.recorded():
            said = fault_of(here)
        assert ("Input/output error" in said) == bool(disk.paths("fail"))
        if not said:
            assert number > 10
            return
        assert disk.paths("fail")[0] not in disk.renamed_unflushed()
        check_next_run(here)


class Interrupted(BaseException):
    """Ends a run as a signal does, wherever it is."""


def test_a_run_that_is_interrupted_before_any_of_its_names_is_completed_by_the_next(tmp_path: Path) -> None:
    for number in count():
        here = merged_once(tmp_path / str(number))
        left = count(-number)

        def interrupt(_: Effect, left: Iterator[int] = left) -> None:
            if next(left) == 0:
                raise Interrupted

        with Disk(tmp_path, before=interrupt).recorded(), suppress(Interrupted):
            here.run()
        if next(left) <= 0:
            assert number > 10
            return
        check_next_run(here)


def check_next_run(here: World) -> None:
    assert here.master in (MERGED, FIRST.encode())
    here.run()
    assert here.master == MERGED
    assert here.waiting == []
    assert {(here.config.archive_dir / name).read_text() for name in here.archived} == {FIRST, SECOND}
    assert not InboxPaths(here.config).journal.exists()
    assert {load.file: load.rows_after for load in here.loads} == {"1.csv": 2, "2.csv": 3}


def test_a_file_whose_setting_aside_was_interrupted_is_set_aside_once(tmp_path: Path) -> None:
    here = world(tmp_path)
    path = here.drop("bad.csv", "k,a\nx\n")

    def interrupt(effect: Effect) -> None:
        if (effect.what, effect.path) == ("rename", path):
            raise Interrupted

    with Disk(tmp_path, before=interrupt).recorded(), pytest.raises(Interrupted):
        here.run()
    assert here.waiting == ["bad.csv"]
    here.run()
    assert here.rejected == ["bad.csv", "bad.csv.bad_rows.csv", "bad.csv.reason.json"]
    assert [load.outcome for load in here.loads] == ["rejected"]


def test_a_reason_whose_file_a_person_took_away_stays_and_another_file_gets_another_name(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("bad.csv", "k,a\nx\n")
    before = here.reason("bad.csv")
    (here.config.rejected_dir / "bad.csv").unlink()
    here.take("bad.csv", "k,a\nxx,1,2\n")
    assert here.reason("bad.csv") == before
    assert sum(name.endswith(".reason.json") for name in here.rejected) == 2
