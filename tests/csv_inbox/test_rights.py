"""A file that may be read and not be taken out of the inbox keeps no other waiting."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from inbox_world import world

NOBODY = 65_534


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder below which another user may go, as below `tmp_path` none may."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of two users")
def test_a_file_that_this_user_may_not_take_out_stays_and_is_named_and_the_others_are_merged(shared: Path) -> None:
    for content in ("k,a\nx,1\n", "k,a\nx,2\n"):  # what is imported on the way may be out of the other user's reach
        world(shared / "before").take("1.csv", content)
    here = world(shared / "inbox")
    here.folder.mkdir(mode=0o777)
    here.folder.chmod(0o777)
    here.drop("1-theirs.csv", "k,a\nx,1\n")
    here.config.watch_dir.chmod(0o1777)
    child = os.fork()
    if child == 0:
        told = []
        try:
            os.setuid(NOBODY)
            here.drop("2-own.csv", "k,a\ny,1\n")
            runs = here.run(), here.take("3-own.csv", "k,a\nz,1\n")
            told = [(run.rows, [each.partition for each in run.failures], run.ledger.total.waiting) for run in runs]
        finally:
            os._exit(0 if told == [(1, ["1-theirs.csv"], 1)] * 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert here.master == b"k,a\ny,1\nz,1\n"
    assert here.waiting == ["1-theirs.csv"]
    here.run()
    assert here.master == b"k,a\ny,1\nz,1\nx,1\n"
