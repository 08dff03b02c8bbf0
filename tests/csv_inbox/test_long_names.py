"""Names as long as a directory can hold, in whatever script: nothing that is made of them is too long."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from app.core.errors import BadSettings
from app.core.files import NAME_BYTES, bounded_name, write_durably
from app.csv_inbox.discovery import InboxPaths
from inbox_world import World, world

LONG = [
    "a" * 251 + ".csv",
    "a" * 232 + ".csv",
    "中" * 83 + ".csv",
    "é" * 125 + ".CSV",
    "😀" * 62 + "x.csv",
    os.fsdecode(b"\xff" * 251) + ".csv",
    os.fsdecode(b"\xbf" * 251) + ".csv",
    "x." * 125 + ".csv",
]


def short_enough(here: World) -> None:
    for path in here.folder.rglob("*"):
        assert len(os.fsencode(path.name)) <= NAME_BYTES


@pytest.mark.parametrize("name", LONG, ids=range(len(LONG)))
def test_a_file_with_a_long_name_is_merged_and_archived_and_the_next_run_goes_on(tmp_path: Path, name: str) -> None:
    here = world(tmp_path)
    assert not here.take(name, "k,a\nx,1\n").failures
    assert not here.take(name, "k,a\nx,2\n").failures
    assert not here.take("good.csv", "k,a\ny,1\n").failures
    assert here.master == b"k,a\nx,2\ny,1\n"
    contents = sorted((here.config.archive_dir / each).read_bytes() for each in here.archived)
    assert contents == [b"k,a\nx,1\n", b"k,a\nx,2\n", b"k,a\ny,1\n"]
    short_enough(here)


@pytest.mark.parametrize("name", LONG, ids=range(len(LONG)))
def test_a_bad_file_with_a_long_name_is_set_aside_with_reason_and_rows_and_stops_no_other(
    tmp_path: Path, name: str
) -> None:
    here = world(tmp_path)
    for content in ("k,a\n1\n", "k,a\n2\n"):
        os.utime(here.drop(name, content), (1, 1))
        here.drop("good.csv", "k,a\ny,1\n")
        assert len(here.run().failures) == 1
    assert here.waiting == []
    assert here.master == b"k,a\ny,1\n"
    reasons = [each for each in here.rejected if each.endswith(".reason.json")]
    assert len(reasons) == 2
    for reason in reasons:
        stem = reason.removesuffix(".reason.json")
        bad = (here.config.rejected_dir / stem).read_bytes()
        assert (here.config.rejected_dir / f"{stem}.bad_rows.csv").read_bytes() == bad
    short_enough(here)


def test_rows_that_come_late_to_a_file_with_a_long_name_are_taken_in(tmp_path: Path) -> None:
    here = world(tmp_path)
    with here.drop("中" * 83 + ".csv", "k,a\nx,1\n").open("ab", 0) as writer:
        here.run()
        writer.write(b"y,2\n")
    here.run()
    assert here.master == b"k,a\nx,1\ny,2\n"
    short_enough(here)


@pytest.mark.parametrize("name", ["m" * 255, "m" * 251 + ".csv", "中" * 85, "m" * 198, "m" * 197])
def test_a_master_with_a_long_name_has_all_its_files_beside_it(tmp_path: Path, name: str) -> None:
    here = world(tmp_path, merged_file=name)
    here.take("1.csv", "k,a,gone\nx,1,\n")
    here.take("2.csv", "k,a\nx,2\n")
    here.take("bad.csv", "k,a\nx\n")
    assert here.master == b"k,a\nx,2\n"
    assert InboxPaths(here.config).index.parent == tmp_path
    here.undo(here.loads[1].run_id)
    assert here.master == b"k,a,gone\nx,1,\n"
    short_enough(here)


def test_a_journal_of_an_earlier_version_with_too_long_an_archive_name_is_carried_out(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", "k,a\nx,1\n")
    name = "中" * 80 + ".csv"
    source = here.drop(name, "k,a\ny,2\n")
    pending = here.config.archive_dir / ".pending-20261128T040404.123-12345678"
    pending.hardlink_to(source)
    found = source.stat()
    load = asdict(here.loads[0]) | {"load_id": "20261128T040404.123-12345678", "file": name}
    journal = {
        "version": 1,
        "renamings": [],
        "removals": [],
        "archiving": {
            "pending": f"csv_archive/{pending.name}",
            "target": f"csv_archive/{name}.20261128T040404.123",
            "source": f"csv_inbox/{name}",
            "identity": {
                "device": found.st_dev,
                "inode": found.st_ino,
                "size": found.st_size,
                "mtime_ns": found.st_mtime_ns,
            },
            "digest": "",
        },
        "load": load,
    }
    InboxPaths(here.config).journal.write_text(json.dumps(journal))
    here.take("good.csv", "k,a\nz,3\n")
    assert here.waiting == []
    assert len(here.archived) == 3
    assert not InboxPaths(here.config).journal.exists()


def test_names_that_are_cut_stay_different_and_whole_characters() -> None:
    one, other = "中" * 100 + "1.csv", "中" * 100 + "2.csv"
    cut = bounded_name(one, ".stamp")
    assert cut != bounded_name(other, ".stamp")
    assert cut == bounded_name(one, ".stamp")
    assert cut.endswith(".csv.stamp")
    assert set(cut.partition("~")[0]) == {"中"}
    assert NAME_BYTES - 2 <= len(os.fsencode(cut)) <= NAME_BYTES
    assert bounded_name("a" * 249, ".stamp") == "a" * 249 + ".stamp"


def test_a_file_with_the_longest_name_can_be_written_durably(tmp_path: Path) -> None:
    write_durably(tmp_path / ("n" * NAME_BYTES), [b"x"])
    assert [path.name for path in tmp_path.iterdir()] == ["n" * NAME_BYTES]


@pytest.mark.parametrize(("key", "size"), [("merged_file", 256), ("metadata_file", 256), ("log_file", 254)])
def test_a_name_that_no_directory_can_hold_is_a_wrong_value(tmp_path: Path, key: str, size: int) -> None:
    with pytest.raises(BadSettings, match=f"{key}: a name of {size} bytes"):
        world(tmp_path, **{key: "n" * size})
