"""What a person does with an inbox: dry runs, merges taken back, the log, the command line and its configuration."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.core.errors import BadSettings, Rejected
from app.csv_inbox.config import load_config
from app.csv_inbox.discovery import InboxPaths
from app.csv_inbox.job import run
from inbox_world import world


def test_a_dry_run_changes_nothing_and_tells_each_file(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a,gone\nx,1,\ny,2,\n")
    os.utime(here.drop("1.csv", "k,a,new\nx,8,\nz,3,5\n"), (100, 100))
    os.utime(here.drop("2.csv", "k,a\nz,4\n"), (200, 200))
    os.utime(here.drop("3.csv", "nothing\n"), (300, 300))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    report = here.run(dry_run=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    first, second, third = report.notes
    assert first == (
        "1.csv: valid, 2 rows: 1 inserted, 1 replaced, 0 unchanged; "
        "columns added: new; columns removed: gone; 3 rows in all"
    )
    assert second.startswith("2.csv: valid, 1 rows: 0 inserted, 1 replaced")
    assert third.startswith("3.csv: would be rejected: line 1: the column 'k' is missing")
    assert len(report.failures) == 1


def test_a_merge_can_be_taken_back_with_all_later_ones_to_the_byte(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("0.csv", 'k,a\nx,1\n"y",2\nz,3')
    one = here.master
    here.take("1.csv", "k,a\ny,9\nw,4\n")
    two = here.master
    here.take("2.csv", "k,a,b\nx,8,8\n")
    run_id = here.loads[1].run_id
    seen = here.undo(run_id[:12], dry_run=True)
    assert [note.split(",")[0] for note in seen.notes] == ["2.csv", "1.csv"]
    assert here.metadata["row_count"] == 4
    here.undo(here.loads[0].run_id)
    assert here.master == two
    here.undo(run_id)
    assert here.master == one
    assert here.metadata["columns"] == ["k", "a"]
    assert [load.outcome for load in here.loads] == ["undone", "undone", "merged"]
    here.take("3.csv", "k,a\ny,7\n")
    assert here.metadata["row_count"] == 3


@pytest.mark.parametrize("cut", [1, 16, 20, 1000])
def test_undo_refuses_what_was_kept_of_the_master_when_it_is_damaged(tmp_path: Path, cut: int) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a\nx,1\ny,2\nz,3\n")
    here.take("1.csv", "k,a\nx,9\nz,9\n")
    after = here.master
    kept = max(InboxPaths(here.config).loads.glob("*.undo"))
    kept.write_bytes(kept.read_bytes()[cut:])
    with pytest.raises(Rejected, match="damaged"):
        here.undo(here.loads[0].run_id)
    here.run()
    assert here.master == after
    assert not [name for name in here.names(tmp_path) if ".tmp" in name]


def test_undo_refuses_a_master_that_something_else_changed(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a\nx,1\n")
    here.take("1.csv", "k,a\nx,2\n")
    edited = here.master + b"hand,made\n"
    here.config.merged_file.write_bytes(edited)
    with pytest.raises(Rejected, match="changed by something else"):
        here.undo(here.loads[0].run_id)
    assert here.master == edited


def test_only_the_last_merges_can_be_taken_back(tmp_path: Path) -> None:
    here = world(tmp_path, undo_keep=2)
    for number in range(4):
        here.take(f"{number}.csv", f"k,a\nx,{number}\n")
    with pytest.raises(Rejected, match="can no longer be undone"):
        here.undo(here.loads[2].run_id)
    with pytest.raises(Rejected, match="no merge of a run"):
        here.undo("nonsense")
    here.undo(here.loads[1].run_id)
    assert here.master == b"k,a\nx,1\n"
    assert not [name for name in here.names(InboxPaths(here.config).loads) if name.endswith(".undo")]


def test_merges_after_a_clock_was_set_back_are_the_newest_and_can_be_taken_back(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a\nx,0\n")
    ahead = here.work()
    here.drop("1.csv", "k,a\nx,1\n")
    run(replace(ahead, clock=lambda: datetime.now(UTC) + timedelta(days=400)))
    here.take("2.csv", "k,a\nx,2\n")
    here.take("3.csv", "k,a\nx,3\n")
    assert [load.file for load in here.loads] == ["3.csv", "2.csv", "1.csv", "0.csv"]
    here.undo(here.loads[0].run_id)
    assert here.master == b"k,a\nx,2\n"
    here.undo(here.loads[2].run_id)
    assert here.master == b"k,a\nx,0\n"


def test_a_full_log_moves_aside_and_five_older_ones_are_kept(tmp_path: Path) -> None:
    here = world(tmp_path)
    log = here.config.log_file
    for number in range(8):
        if log.exists():
            with log.open("a") as file:
                file.write("x" * 1_000_000 + "\n")
        here.take(f"{number}.csv", f"k,a\n{number},1\n")
        assert f"{number}.csv: merged" in log.read_text()
    kept = sorted(path.name for path in tmp_path.glob("csv_watchdog.log*"))
    assert kept == ["csv_watchdog.log", *(f"csv_watchdog.log.{older}" for older in range(1, 6))]
    assert "6.csv: merged" in (tmp_path / "csv_watchdog.log.1").read_text()


def command(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environ = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_documented_example_works_from_the_command_line_with_its_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "watch_dir": "csv_inbox",
                "archive_dir": "csv_archive",
                "merged_file": "final_clusters_data.csv",
                "metadata_file": "merged_metadata.json",
                "key_column": "cluster_name",
                "required_columns": ["id", "name"],
                "checksum_wait_seconds": 0.1,
                "max_file_size_mb": 500,
                "csv_delimiter": ",",
                "csv_encoding": "utf-8",
                "log_level": "INFO",
                "log_to_console": True,
            }
        )
    )
    (tmp_path / "csv_inbox").mkdir()
    (tmp_path / "csv_inbox" / "data_batch1.csv").write_text("cluster_name,id,name\nc1,001,one\n")
    dry = command(tmp_path, "run", "csv_inbox", "--dry-run")
    assert (dry.returncode, "valid, 1 rows" in dry.stdout) == (0, True)
    assert not (tmp_path / "final_clusters_data.csv").exists()
    fine = command(tmp_path, "run", "csv_inbox")
    assert (fine.returncode, "1 inserted" in fine.stdout) == (0, True)
    assert (tmp_path / "final_clusters_data.csv").read_text() == "cluster_name,id,name\nc1,001,one\n"
    for name in ("csv_archive", "merged_metadata.json", "csv_watchdog.log"):
        assert (tmp_path / name).exists()
    (tmp_path / "csv_inbox" / "bad.csv").write_text("cluster_name,id\nc2,2\n")
    assert command(tmp_path, "run", "csv_inbox").returncode == 1
    shown = command(tmp_path, "runs", "csv_inbox").stdout
    run = next(line.split() for line in shown.splitlines() if "data_batch1.csv" in line)
    assert "rejected" in shown
    seen = command(tmp_path, "undo", "csv_inbox", next(word for word in run if re.fullmatch(r"[0-9a-f]{12}", word)))
    assert (seen.returncode, "1 rows become 0" in seen.stdout, "--yes" in seen.stdout) == (0, True, True)
    (tmp_path / "csv_inbox" / "more.csv").write_text("cluster_name,id,name\nc2,2,two\n")
    (tmp_path / "final_clusters_data.csv").write_text("broken")
    done = command(tmp_path, "run", "csv_inbox")
    assert (done.returncode, "never" in done.stderr or "not changed" in done.stderr) == (2, True)


def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text('{"watchdir": "in", "csv_delimiter": "::", "undo_keep": -1}')
    environ = {"PATH": os.environ["PATH"], "CSV_MONITOR_CONFIG": str(tmp_path / "my.json")}
    done = subprocess.run(
        [sys.executable, "-m", "app", "run", "csv_inbox"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert len(done.stderr.splitlines()) == 3
    assert "did you mean 'watch_dir'?" in done.stderr


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"merged_file": "/"}', "merged_file: a name of 0 bytes"),
        ('{"csv_encoding": "unicode_escape"}', "csv_encoding"),
        ('{"csv_encoding": "hex"}', "csv_encoding"),
        ('{"key_column": "\\ud800"}', "key_column"),
    ],
)
def test_an_odd_configuration_is_a_fault_that_is_told(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "my.json").write_text(content)
    with pytest.raises(BadSettings, match=told):
        load_config(tmp_path / "my.json", tmp_path)


def test_a_run_to_undo_is_named_by_a_beginning_of_its_id_that_only_it_has(tmp_path: Path) -> None:
    here = world(tmp_path)
    for run_id in ("abcd-1", "abcd-2"):
        work = here.work()
        here.drop(f"{run_id}.csv", f"k,a\n{run_id},1\n")
        run(replace(work, context=replace(work.context, run_id=run_id)))
    for wrong, told in (("abcd", "several runs begin with 'abcd'"), ("abc", "no merge of a run"), ("", "no merge")):
        with pytest.raises(Rejected, match=told):
            here.undo(wrong)
    here.undo("abcd-2")
    assert here.master == b"k,a\nabcd-1,1\n"
    here.undo("abcd")
    assert not here.config.merged_file.exists()
