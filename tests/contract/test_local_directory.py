"""What only the directory can get wrong: kills, two processes, clocks, links, and what a person puts there."""

import io
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from app.core.errors import Permanent, Rejected, Transient
from app.object_store.local import LocalDirectory
from app.object_store.port import PutRequest
from disk_effects import Disk
from needs import absent
from object_stores import ANY, CREATE, get, keys, put


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def local(root: Path) -> LocalDirectory:
    return LocalDirectory(root)


DIE_BEFORE_RENAME = """
import io, os, signal, sys
from pathlib import Path
from typing import Any
from app.object_store.local import LocalDirectory
from app.object_store.port import PutRequest

def die(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
note = {"rows": "2", "long": "x" * int(sys.argv[3])}
LocalDirectory(Path(sys.argv[1])).put("a/k", io.BytesIO(b"new bytes"), PutRequest("text/new", note))
"""
TOO_LONG = 100_000  # for an extended attribute, which holds 64 KiB at most on any file system of Linux

ADD_ONE_BY_ONE = """
import io, sys
from pathlib import Path
from typing import Any
from app.core.errors import Conflict
from app.object_store.local import LocalDirectory
from app.object_store.port import PutRequest

store, done = LocalDirectory(Path(sys.argv[1])), 0
while done < int(sys.argv[2]):
    info = store.head("sum")
    try:
        with store.open("sum", info.etag if info else None) as stream:
            found = int(stream.read()) if stream else 0
        store.put("sum", io.BytesIO(b"%d" % (found + 1)), PutRequest("text/plain", expected=info.etag if info else ""))
    except Conflict:
        continue
    done += 1
"""


def start(program: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)])


class TestLocalDirectory:
    def test_conditions_are_said_to_hold_only_after_the_probe_which_leaves_nothing(self, local: LocalDirectory) -> None:
        assert not local.conditional
        local.probe()
        assert local.conditional
        assert keys(local) == []

    @pytest.mark.parametrize("long", [0, TOO_LONG])
    def test_metadata_of_any_length_comes_back(self, local: LocalDirectory, root: Path, long: int) -> None:
        for number in ("1", "2"):
            put(local, "a/k", number.encode(), PutRequest("text/x", {"rows": number, "long": "x" * long}))
            info = local.head("a/k")
            assert info is not None
            assert (info.content_type, info.metadata) == ("text/x", {"rows": number, "long": "x" * long})
        (root / "a" / "k").write_bytes(b"changed by another program")
        info = local.head("a/k")
        assert info is not None
        assert info.metadata == {}

    @pytest.mark.parametrize("long", [0, TOO_LONG])
    def test_a_copy_of_the_directory_has_the_same_metadata(self, local: LocalDirectory, root: Path, long: int) -> None:
        headers = {"content-encoding": "gzip", "x-amz-tagging": "a=b"}
        put(local, "a/k", b"1", PutRequest("text/x", {"rows": "1", "long": "x" * long}, headers=headers))
        copied = root.with_name("copied")
        shutil.copytree(root, copied)  # with times and extended attributes, as `cp -a`
        before, after = local.head("a/k"), LocalDirectory(copied).head("a/k")
        assert before is not None
        assert after == replace(before, etag=after.etag if after else "")
        (copied / "a" / "k").write_bytes(b"2")
        changed = LocalDirectory(copied).head("a/k")
        assert changed is not None
        assert changed.metadata == {}

    def test_a_kill_before_the_rename_changes_nothing(self, local: LocalDirectory, root: Path) -> None:
        put(local, "a/k", b"old bytes", PutRequest("text/old", {"rows": "1"}))
        before = local.head("a/k")
        assert start(DIE_BEFORE_RENAME, root, "a/k", 0).wait(20) == -signal.SIGKILL
        assert local.head("a/k") == before
        assert get(local, "a/k") == b"old bytes"

    def test_a_kill_between_note_and_rename_costs_metadata_and_never_lies(
        self, local: LocalDirectory, root: Path
    ) -> None:
        etag = put(local, "a/k", b"old bytes", PutRequest("text/old", {"rows": "1", "long": "y" * TOO_LONG}))
        assert start(DIE_BEFORE_RENAME, root, "a/k", TOO_LONG).wait(20) == -signal.SIGKILL
        assert get(local, "a/k", etag) == b"old bytes"
        info = local.head("a/k")
        assert info is not None
        assert (info.etag, info.metadata) == (etag, {})
        put(local, "a/k", b"next", PutRequest("text/next", {"rows": "3"}, etag))
        info = local.head("a/k")
        assert info is not None
        assert (info.content_type, info.metadata) == ("text/next", {"rows": "3"})

    def test_a_kill_before_the_note_changes_nothing(self, local: LocalDirectory, root: Path) -> None:
        put(local, "a/k", b"old bytes", PutRequest("text/old", {"rows": "1"}))
        before = local.head("a/k")
        assert start(DIE_BEFORE_RENAME, root, ".json", TOO_LONG).wait(20) == -signal.SIGKILL
        assert local.head("a/k") == before
        assert get(local, "a/k") == b"old bytes"

    @pytest.mark.parametrize("long", [0, TOO_LONG])
    def test_bytes_note_and_name_of_an_object_are_on_the_disk_when_put_returns(
        self, local: LocalDirectory, root: Path, long: int
    ) -> None:
        disk = Disk(root)
        with disk.recorded():
            put(local, "a/b/k", b"bytes", PutRequest("text/x", {"long": "x" * long}))
        assert (disk.renamed_unflushed(), disk.unflushed_names()) == ([], [])
        assert [each.target for each in disk.effects if each.what == "rename"][-1] == root / "a/b/k"
        assert set(disk.paths("flush")) > {root, root / "a", root / "a/b"}
        gone = Disk(root)
        with gone.recorded():
            local.delete("a/b/k")
        assert [(each.what, each.path) for each in gone.effects][:2] == [
            ("remove", root / "a/b/k"),
            ("flush", root / "a/b"),
        ]

    def test_a_disk_that_fails_is_said_and_the_old_object_stays(self, local: LocalDirectory, root: Path) -> None:
        put(local, "a/k", b"old")
        disk = Disk(root, broken=lambda _: True)
        with disk.recorded(), pytest.raises(Permanent, match="a/k: Input/output error") as told:
            put(local, "a/k", b"new")
        assert "kernel's log" in told.value.hint
        assert [each.what for each in disk.effects] == ["fail", "remove"]
        assert get(local, "a/k") == b"old"

    def test_leftovers_of_killed_writers_go_with_a_probe_when_they_are_old(
        self, local: LocalDirectory, root: Path
    ) -> None:
        assert start(DIE_BEFORE_RENAME, root, "a/k", 0).wait(20) == -signal.SIGKILL
        (leftover,) = (root / ".headwater" / "tmp").iterdir()
        local.probe()
        assert leftover.exists()
        os.utime(leftover, (0, 0))
        local.probe()
        assert not leftover.exists()
        assert keys(local) == []

    def test_two_processes_lose_no_update(self, local: LocalDirectory, root: Path) -> None:
        writers = [start(ADD_ONE_BY_ONE, root, 25) for _ in range(2)]
        assert [writer.wait(60) for writer in writers] == [0, 0]
        assert get(local, "sum") == b"50"

    def test_an_etag_never_comes_back_while_the_clock_stands_still(self, root: Path) -> None:
        store = LocalDirectory(root, lambda: 1_700_000_000_000_000_000)
        etags = [put(store, "k", b"same") for _ in range(40)]
        assert len(set(etags)) == len(etags)

    def test_a_clock_that_was_set_back_does_not_bring_an_etag_back(self, root: Path) -> None:
        backwards = count(1_700_000_000_000_000_000, -1_000_000_000)
        store = LocalDirectory(root, lambda: next(backwards))
        times = [int(put(store, "k", b"same").split("-")[1]) for _ in range(10)]
        assert all(earlier < later for earlier, later in pairwise(times))

    def test_names_are_listed_in_utf8_order_of_the_whole_key(self, local: LocalDirectory) -> None:
        made = ["a-b", "a/x", "a/y/z", "a/y0", "a0", "a\U0001f600", "b", "a.b/c", "a\uff5e", "Z", "a/y-"]
        for key in made:
            put(local, key, b"1")
        assert keys(local) == sorted(made, key=str.encode)
        assert keys(local, "a/y") == ["a/y-", "a/y/z", "a/y0"]

    def test_a_file_of_a_person_is_an_object_too(self, local: LocalDirectory, root: Path) -> None:
        (root / "drop").mkdir(parents=True)
        (root / "drop" / "day_001.parquet").write_bytes(b"PAR1")
        info = local.head("drop/day_001.parquet")
        assert info is not None
        assert info.metadata == {}
        assert get(local, "drop/day_001.parquet", info.etag) == b"PAR1"
        assert [found.etag for found in local.list("")] == [info.etag]
        put(local, "drop/day_001.parquet", b"PAR2", replace(ANY, expected=info.etag))

    def test_a_change_by_a_person_is_another_version_without_metadata(self, local: LocalDirectory, root: Path) -> None:
        etag = put(local, "k", b"12", PutRequest("text/plain", {"rows": "1"}))
        (root / "k").write_bytes(b"123")
        info = local.head("k")
        assert info is not None
        assert (info.etag == etag, info.metadata) == (False, {})

    def test_the_hidden_folder_is_out_of_reach(self, local: LocalDirectory, root: Path) -> None:
        put(local, "k", b"1")
        assert (root / ".headwater" / "lock").exists()
        assert keys(local) == keys(local, "k") == ["k"]
        assert keys(local, ".headwater/") == keys(local, ".head") == []
        for use in (local.head, local.delete, lambda key: get(local, key), lambda key: put(local, key, b"1")):
            with pytest.raises(Rejected):
                use(".headwater/lock")

    def test_symbolic_links_are_not_followed(self, local: LocalDirectory, root: Path, tmp_path: Path) -> None:
        put(local, "k", b"1")
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "secret").write_bytes(b"secret")
        (root / "folder").symlink_to(outside)
        (root / "file").symlink_to(outside / "secret")
        for key in ("folder/secret", "file"):
            for use in (local.head, local.delete, lambda key: get(local, key), lambda key: put(local, key, b"1")):
                with pytest.raises(Rejected):
                    use(key)
        with pytest.raises(Rejected):
            put(local, "folder/new", b"1")
        assert keys(local) == ["k"]
        assert keys(local, "folder/") == []
        assert [path.name for path in outside.iterdir()] == ["secret"]

    def test_a_root_behind_a_symbolic_link_is_fine(self, root: Path, tmp_path: Path) -> None:
        root.mkdir()
        (tmp_path / "link").symlink_to(root)
        put(LocalDirectory(tmp_path / "link"), "k", b"1")
        assert keys(LocalDirectory(root)) == ["k"]

    def test_a_key_that_is_a_folder_or_below_a_file_is_rejected(self, local: LocalDirectory, root: Path) -> None:
        put(local, "a/b", b"1")
        for key in ("a", "a/b/c"):
            with pytest.raises(Rejected, match="rename one"):
                put(local, key, b"2")
        assert keys(local) == ["a/b"]
        assert list((root / ".headwater" / "tmp").iterdir()) == []

    def test_a_name_too_long_for_the_file_system_is_rejected_and_leaves_nothing(
        self, local: LocalDirectory, root: Path
    ) -> None:
        with pytest.raises(Rejected, match="255"):
            put(local, "a/b/" + "n" * 256, b"1")
        put(local, "n" * 255, b"1")
        assert sorted(path.name for path in root.iterdir()) == [".headwater", "n" * 255]

    def test_a_folder_that_a_killed_writer_left_empty_is_in_nobodys_way(
        self, local: LocalDirectory, root: Path
    ) -> None:
        (root / "a" / "b").mkdir(parents=True)
        put(local, "a/b", b"1", CREATE)
        assert keys(local) == ["a/b"]

    def test_a_fifo_is_no_object_and_hangs_nobody(self, local: LocalDirectory, root: Path) -> None:
        root.mkdir()
        os.mkfifo(root / "pipe")
        assert local.head("pipe") is None
        assert get(local, "pipe") is None
        assert keys(local) == []

    def test_deleting_leaves_no_empty_folder_and_no_metadata(self, local: LocalDirectory, root: Path) -> None:
        put(local, "a/b/c", b"1", PutRequest("text/plain", {"rows": "1", "long": "x" * TOO_LONG}))
        assert len(list((root / ".headwater" / "meta").iterdir())) == 1
        local.delete("a/b/c")
        assert [path.name for path in root.iterdir()] == [".headwater"]
        assert list((root / ".headwater" / "meta").iterdir()) == []

    def test_a_body_that_fails_leaves_the_old_object(self, local: LocalDirectory, root: Path) -> None:
        class Broken(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                raise Transient(f"the other side broke off before {size} bytes")

        put(local, "k", b"old")
        with pytest.raises(Transient, match="broke off"):
            local.put("k", Broken(b"new"), ANY)
        assert get(local, "k") == b"old"
        assert list((root / ".headwater" / "tmp").iterdir()) == []

    def test_an_open_reader_keeps_its_version(self, local: LocalDirectory) -> None:
        put(local, "k", b"old")
        with local.open("k") as stream:
            put(local, "k", b"new")
            local.delete("k")
            assert stream is not None
            assert stream.read() == b"old"

    @pytest.mark.parametrize("disk", ["the same disk", "another disk"])
    def test_a_pinned_version_stays_when_its_key_is_replaced_or_deleted(
        self, disk: str, local: LocalDirectory, tmp_path: Path
    ) -> None:
        with TemporaryDirectory(dir=tmp_path if disk == "the same disk" else another_disk(tmp_path)) as folder:
            target = Path(folder) / "pinned"
            etag = put(local, "a/k", b"old" * 1_000_000)
            assert local.pin("a/k", target) == etag
            put(local, "a/k", b"new")
            local.delete("a/k")
            assert target.read_bytes() == b"old" * 1_000_000
            assert [local.pin(key, Path(folder) / "none") for key in ("a/k", "a", "b")] == [None] * 3
            put(local, "a/k", b"x")
            assert [local.pin(key, Path(folder) / "none") for key in ("a", "a/k/b")] == [None] * 2, (
                "a folder; below a file"
            )
            assert list(Path(folder).iterdir()) == [target]


def another_disk(folder: Path) -> Path:
    """Where a file of `folder` can have no second name."""
    for other in (Path("/dev/shm"), Path("/tmp"), Path.home()):  # noqa: S108 - a folder of random name is made there
        if os.access(other, os.W_OK) and other.stat().st_dev != folder.stat().st_dev:
            return other
    return absent("there is no second file system to write to")
