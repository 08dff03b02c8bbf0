"""What lies beside the master is lost, or restored from a backup, at any moment of a merge: nothing stops, nothing is
lost, nothing comes twice.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.core.errors import Permanent
from app.csv_inbox.discovery import InboxPaths
from app.csv_inbox.transaction import recover
from disk_effects import Disk, Effect
from inbox_kills import child
from inbox_world import World, world

OLD, NEW = "k,a\nx,1\ny,1\n", "k,a\ny,2\nz,2\n"
BEFORE_COMMIT = 32
MERGED = b"k,a\nx,1\ny,2\nz,2\n"


def begun(folder: Path) -> Iterator[World]:
    """Inboxes in which the merge of the second file was killed after its commit, before every other of its events."""
    for event in range(BEFORE_COMMIT, 1000, 2):
        here = world(folder / str(event))
        here.take("old.csv", OLD)
        here.drop("new.csv", NEW)
        pid = os.fork()
        if pid == 0:
            os._exit(child(f"{here.folder} {event}"))
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            return
        if InboxPaths(here.config).journal.exists():
            yield here


def check(here: World, master: bytes = MERGED) -> None:
    assert here.master == master
    assert here.waiting == []
    assert not InboxPaths(here.config).journal.exists()
    # A file that is archived already may be merged once more, which changes nothing.
    assert {(here.config.archive_dir / name).read_text() for name in here.archived} == {OLD, NEW}


@pytest.mark.slow
def test_history_metadata_and_index_may_be_gone_when_a_merge_is_completed(tmp_path: Path) -> None:
    number = 0
    for here in begun(tmp_path):
        number += 1
        shutil.rmtree(InboxPaths(here.config).loads)
        here.config.metadata_file.unlink(missing_ok=True)
        InboxPaths(here.config).index.unlink(missing_ok=True)
        assert recover(InboxPaths(here.config)), "as a run does, and an undo"
        check(here)
    assert number > 5


@pytest.mark.slow
def test_without_its_journal_a_merge_is_completed_or_done_again(tmp_path: Path) -> None:
    for here in begun(tmp_path):
        InboxPaths(here.config).journal.unlink()
        here.run()
        check(here)


@pytest.mark.slow
def test_a_journal_that_is_set_back_changes_nothing_and_each_end_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for here in begun(tmp_path):
        journal = InboxPaths(here.config).journal
        old = journal.read_bytes()
        here.run()
        assert "before the process ended is complete now: new.csv" in caplog.text
        here.take("last.csv", "k,a\ny,3\n")
        after, archived, history = here.master, here.archived, here.loads
        journal.write_bytes(old)
        caplog.clear()
        here.run()
        assert "new.csv: the journal does not fit what is there" in caplog.text
        assert "is complete now" not in caplog.text
        assert not journal.exists()
        assert (here.master, here.archived, here.loads) == (after, archived, history)


@pytest.mark.slow
def test_a_merge_whose_new_master_is_gone_is_done_again_while_the_file_is_in_the_inbox(tmp_path: Path) -> None:
    outcomes = []
    for here in begun(tmp_path):
        before = here.folder / "before.csv"
        before.write_text(OLD)
        for path in here.folder.glob(".*.master.merge.tmp"):
            path.unlink()
        before.replace(here.config.merged_file)
        is_held = bool(here.waiting)
        here.run()
        outcomes.append(is_held)
        check(here, MERGED if is_held else OLD.encode())
    assert True in outcomes


def test_a_merge_whose_new_master_is_gone_stops_when_its_file_was_replaced_in_the_inbox(tmp_path: Path) -> None:
    here = next(begun(tmp_path))
    (tmp_path / "another.csv").write_text("k,a\nw,9\n")
    (tmp_path / "another.csv").replace(here.config.watch_dir / "new.csv")
    next(here.folder.glob(".*.master.merge.tmp")).unlink()
    with pytest.raises(Permanent, match="a committed step cannot be completed"):
        here.run()
    assert here.waiting == ["new.csv"]


def journal_of(here: World, work: Callable[[], object]) -> bytes:
    """What `work` commits, which is done then."""
    journal, found = InboxPaths(here.config).journal, list[bytes]()

    def look(_: Effect) -> None:
        if journal.exists():
            found.append(journal.read_bytes())

    with Disk(here.folder, before=look).recorded():
        work()
    return found[0]


@pytest.mark.parametrize("first", [OLD, ""])
def test_a_journal_that_is_set_back_after_its_merge_was_undone_does_not_say_that_it_was_done(
    tmp_path: Path, first: str
) -> None:
    here = world(tmp_path)
    if first:
        here.take("old.csv", first)
    old = journal_of(here, lambda: here.take("new.csv", NEW))
    here.undo(here.loads[0].run_id)
    after = here.names(tmp_path), here.loads
    InboxPaths(here.config).journal.write_bytes(old)
    here.run()
    assert (here.names(tmp_path), here.loads) == after
    assert not first or here.master == OLD.encode()
    shutil.rmtree(InboxPaths(here.config).loads)
    InboxPaths(here.config).journal.write_bytes(old)
    here.run()
    assert [load.file for load in here.loads] == ["new.csv"], (
        "what is in the archive was merged, and is on record again"
    )


def test_an_input_whose_place_in_the_archive_somebody_removed_stays_in_the_inbox(tmp_path: Path) -> None:
    here = world(tmp_path)

    def remove(effect: Effect) -> None:
        if effect.target == here.config.merged_file:
            shutil.rmtree(here.config.archive_dir)
            here.config.archive_dir.mkdir()

    here.drop("new.csv", NEW)
    with Disk(tmp_path, before=remove).recorded():
        here.run()
    assert (here.waiting, here.archived) == (["new.csv"], [])
    here.run()
    assert (here.waiting, len(here.archived)) == ([], 1)
    assert here.master == NEW.encode()


def test_a_journal_of_an_undo_that_is_set_back_removes_no_later_master(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("old.csv", OLD)
    run_id = here.loads[0].run_id
    old = journal_of(here, lambda: here.undo(run_id))
    here.take("new.csv", NEW)
    InboxPaths(here.config).journal.write_bytes(old)
    here.run()
    assert here.master == NEW.encode()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "1", '{"archiving": 1}', '{"archiving": null, "renamings": [[1]]}']
)
def test_a_damaged_journal_stops_the_run_and_changes_nothing(tmp_path: Path, content: str) -> None:
    here = world(tmp_path)
    here.take("old.csv", OLD)
    here.drop("new.csv", NEW)
    InboxPaths(here.config).journal.write_text(content)
    with pytest.raises(Permanent, match=r"journal .* is damaged"):
        here.run()
    assert (here.master, here.waiting) == (OLD.encode(), ["new.csv"])


def test_a_journal_of_late_rows_that_is_set_back_does_not_take_them_in_again(tmp_path: Path) -> None:
    here = world(tmp_path)
    with here.drop("slow.csv", "k,a\nx,1\n").open("a", 1) as writer:
        here.run()
        writer.write("y,2\n")
        old = journal_of(here, here.run)
        writer.write("z,2\n")
        here.run()
        here.take("newer.csv", "k,a\ny,3\nz,3\n")
        InboxPaths(here.config).journal.write_bytes(old)
        here.run()
        here.run()
    assert here.master == b"k,a\nx,1\ny,3\nz,3\n"


@pytest.mark.parametrize("how", ["an older copy is put back", "it is gone"])
def test_a_master_that_is_not_as_the_last_merge_left_it_is_told_until_the_next_merge(tmp_path: Path, how: str) -> None:
    here = world(tmp_path)
    here.take("a.csv", "k,a\n1,x\n")
    older = here.master
    assert here.take("b.csv", "k,a\n2,y\n").notes[0].startswith("b.csv: merged")
    here.config.merged_file.unlink()
    if how == "an older copy is put back":
        here.config.merged_file.write_bytes(older)
    for report in (here.run(), here.run(dry_run=True), here.take("c.csv", "k,a\n3,z\n")):
        assert "since b.csv was merged at" in report.notes[0]
        assert "when it had 2 rows" in report.notes[0]
    assert here.take("d.csv", "k,a\n4,z\n").notes[0].startswith("d.csv: merged")
    here.undo(here.loads[0].run_id)
    assert here.run().notes == ()


def test_files_of_other_names_in_the_inbox_are_told(tmp_path: Path) -> None:
    here = world(tmp_path)
    for name in ("a.xlsx", "b.csv.gz", "c\n.txt", ".hidden"):
        here.drop(name, "k,a\n1,x\n")
    (note,) = here.run().notes
    assert note.endswith(
        "3 files in the inbox are ignored, since their names do not end in .csv: a.xlsx, b.csv.gz, c\\n.txt"
    )
