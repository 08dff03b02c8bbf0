"""Rows that a writer adds after its file was merged: each is taken in once, in its turn, below the same header."""

import os
from pathlib import Path

import pytest

from inbox_world import world


def test_rows_written_after_the_merge_are_taken_in_as_a_file_of_their_own(tmp_path: Path) -> None:
    here = world(tmp_path)
    with here.drop("slow.csv", "k,a\nx,1\n").open("ab", 0) as writer:
        here.run()
        writer.write(b"y,2\n")
        report = here.run()
        writer.write(b"z,3\nx,4\n")
        here.run()
    assert here.master == b"k,a\ny,2\nz,3\nx,4\n"
    assert report.rows == report.ledger.total.counted == report.ledger.total.new == 1
    assert any("4 bytes were written to it after it was merged" in note for note in report.notes)
    contents = sorted((here.config.archive_dir / name).read_bytes() for name in here.archived)
    assert contents == [b"k,a\nx,1\ny,2\nz,3\nx,4\n", b"k,a\ny,2\n", b"k,a\nz,3\nx,4\n"]
    assert here.run() == type(report)()


def test_late_rows_do_not_put_back_what_another_file_replaced(tmp_path: Path) -> None:
    here = world(tmp_path)
    with here.drop("slow.csv", "k,a\nx,1\n").open("ab", 0) as writer:
        here.run()
        here.take("other.csv", "k,a\nx,newer\n")
        writer.write(b"y,2\n")
    here.run()
    assert here.master == b"k,a\nx,newer\ny,2\n"


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [
        ("k,a\nx,1", "2\ny,3\n", b"k,a\nx,12\ny,3\n"),
        ("k,a\nx,1", "\ny,3\n", b"k,a\nx,1\ny,3\n"),
        ("k,a\r\nx,1", "\r\ny,3\r\n", b"k,a\r\nx,1\r\ny,3\r\n"),
        ('k,a\nx,"1\n2"', '"3"\ny,3\n', b'k,a\nx,"1\n2""3"\ny,3\n'),
        ("sep=;\nk;a\nx;1\n", "y;3\n", b"k,a\nx,1\ny,3\n"),
        ("\ufeffk,a,\nx,1,\n", "y,3,\n", b"k,a\nx,1\ny,3\n"),
        ("k,a\nx,1\n", "\n\n,\n", b"k,a\nx,1\n"),
    ],
)
def test_a_row_that_was_cut_is_taken_again_as_a_whole(tmp_path: Path, first: str, then: str, expected: bytes) -> None:
    here = world(tmp_path)
    with here.drop("slow.csv", first).open("ab", 0) as writer:
        here.run()
        writer.write(then.encode())
    here.run()
    assert here.master == expected
    assert here.waiting == []


def test_every_byte_may_be_the_one_before_the_pause(tmp_path: Path) -> None:
    content = b'k,a\n10,"one\n1"\n20,"two, ""2"""\n30,three\n'
    whole = [b'10,"one\n1"\n', b'20,"two, ""2"""\n', b"30,three\n"]
    for first in range(content.index(b"20"), len(content)):
        for second in {first + 1, first + 3, len(content) - 2}:
            here = world(tmp_path / f"{first}-{second}")
            with here.drop("slow.csv", content[:first]).open("ab", 0) as writer:
                here.run()
                if here.rejected:  # cut in mid-row: the file is set aside, and is whole there
                    writer.write(content[first:])
                    assert (here.config.rejected_dir / "slow.csv").read_bytes() == content
                    continue
                writer.write(content[first:second])
                here.run()
                writer.write(content[max(first, second) :])
            here.run()
            assert all(row in here.master for row in whole), (first, second, here.master)
            assert here.waiting == []


def test_a_writer_that_still_writes_is_waited_for(tmp_path: Path) -> None:
    here = world(tmp_path, checksum_wait_seconds=0.05)
    with here.drop("slow.csv", "k,a\nx,1\n").open("ab", 0) as writer:
        here.run()
        writer.write(b"y,2\n")
        here.run()
    assert here.master == b"k,a\nx,1\ny,2\n"


def test_an_archived_file_that_a_person_edits_or_touches_is_left_alone(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", "k,a\nx,1\ny,2\n")
    archived = here.config.archive_dir / here.archived[0]
    os.utime(archived)
    assert here.run().notes == ()
    archived.write_text("k,a\nx,9\n")
    told = here.run()
    assert "was changed after it was merged" in told.notes[0]
    assert here.run() == type(told)()
    archived.unlink()
    assert here.run() == type(told)()
    assert here.master == b"k,a\nx,1\ny,2\n"
    assert "WARNING" in here.config.log_file.read_text()


def test_a_dry_run_only_says_that_there_are_late_rows(tmp_path: Path) -> None:
    here = world(tmp_path)
    with here.drop("slow.csv", "k,a\nx,1\n").open("ab", 0) as writer:
        here.run()
        writer.write(b"y,2\n")
    assert "was written to after it was merged" in here.run(dry_run=True).notes[0]
    assert here.waiting == []
    here.run()
    assert here.master == b"k,a\nx,1\ny,2\n"


def test_a_merge_that_was_taken_back_takes_in_nothing_more(tmp_path: Path) -> None:
    here = world(tmp_path)
    with here.drop("slow.csv", "k,a\nx,1\n").open("ab", 0) as writer:
        here.take("0.csv", "k,a\nw,0\n")
        here.undo(here.loads[0].run_id)
        writer.write(b"y,2\n")
    assert here.run().rows == 0
