"""Files that are whole or absent after a power cut: what is flushed before what is renamed, and a broken disk."""

import hashlib
import os
import re
from pathlib import Path

import pytest

from app.core.files import bounded_name, sync_directory, sync_file, write_durably
from disk_effects import Disk


def test_all_of_a_file_is_on_the_disk_before_its_name_is_and_then_the_name(tmp_path: Path) -> None:
    path, disk = tmp_path / "a", Disk(tmp_path)
    with disk.recorded():
        write_durably(path, [b"some ", b"bytes"])
    assert [(what, size_bytes) for what, _, _, size_bytes in disk.effects][:2] == [("flush", 10), ("rename", 10)]
    assert disk.effects[1].target == path
    assert disk.paths("flush")[1:] == [tmp_path]
    assert (disk.renamed_unflushed(), disk.unflushed_names()) == ([], [])
    assert path.read_bytes() == b"some bytes"


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch(0o640)
    write_durably(path, [b"new"])
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o640)


def test_a_file_whose_fsync_fails_never_gets_the_name_and_is_not_flushed_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    disk = Disk(tmp_path, broken=lambda _: True)
    with disk.recorded(), pytest.raises(OSError, match="Input/output"):
        write_durably(path, [b"new"])
    assert [each.what for each in disk.effects] == ["fail", "remove"]
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"


def test_a_directory_whose_fsync_fails_is_said_as_well(tmp_path: Path) -> None:
    disk = Disk(tmp_path, broken=lambda path: path == tmp_path)
    with disk.recorded(), pytest.raises(OSError, match="Input/output"):
        write_durably(tmp_path / "a", [b"new"])


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_what_cannot_be_flushed_raises_as_the_system_says_it() -> None:
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="Invalid argument"):
        sync_file(writing)
    os.close(reading)
    os.close(writing)
    with pytest.raises(OSError, match="Invalid argument"):
        sync_directory(Path("/proc"))
    descriptors = open_files()
    with pytest.raises(OSError, match="Invalid argument"):
        sync_directory(Path("/proc"))
    assert open_files() == descriptors


def test_a_name_is_cut_only_when_it_is_too_long_and_keeps_its_extension_and_what_is_put_behind() -> None:
    assert bounded_name("a" * 251 + ".csv") == "a" * 251 + ".csv"
    assert bounded_name("a" * 250 + ".csv", "x") == "a" * 250 + ".csvx"
    name = "a" * 252 + ".csv"
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    assert bounded_name(name) == f"{'a' * 234}~{digest}.csv"
    assert bounded_name(name, ".tmp", 100) == f"{'a' * 75}~{digest}.csv.tmp"


@pytest.mark.parametrize(("extension_bytes", "is_kept"), [(16, True), (17, False)])
def test_what_is_too_long_for_an_extension_is_none(extension_bytes: int, *, is_kept: bool) -> None:
    extension = "." + "e" * (extension_bytes - 1)
    assert bounded_name("a" * 300 + extension).endswith(extension) == is_kept


@pytest.mark.parametrize("letter", ["é", "中", "\U0001f600"])
def test_a_name_is_never_cut_inside_a_character(letter: str) -> None:
    for before in range(5):
        name = bounded_name("a" * before + letter * 200)
        assert re.fullmatch(f"a{{{before}}}{letter}+~[0-9a-f]{{16}}", name)
        assert 255 - len(letter.encode()) < len(name.encode()) <= 255
