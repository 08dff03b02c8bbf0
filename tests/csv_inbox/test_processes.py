"""The inbox as real processes: two at once, and on a terminal."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from inbox_world import parsed

ROUNDS, FILES = 4, 6


def started(folder: Path, data_dir: str, *, stderr: int) -> "subprocess.Popen[bytes]":
    """One `run csv_inbox` on the inbox of `folder`. Its state lies apart, so that only the lock keeps two apart."""
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "TERM": "xterm",
        "CSV_MONITOR_CONFIG": str(folder / "config.json"),
        "DATA_DIR": str(folder / data_dir),
    }
    command = [sys.executable, "-m", "app", "run", "csv_inbox"]
    return subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=stderr)


def configured(folder: Path) -> Path:
    keys = {"checksum_wait_seconds": 0.05, "key_column": "k", "lock_timeout_seconds": 60, "index_from_mb": 0}
    (folder / "config.json").write_text(json.dumps(keys))
    (folder / "csv_inbox").mkdir()
    return folder / "csv_inbox"


@pytest.mark.slow
def test_two_processes_at_the_same_moment_merge_each_file_once(tmp_path: Path) -> None:
    inbox = configured(tmp_path)
    expected: dict[str, str] = {}
    for number in range(ROUNDS):
        for file in range(FILES):
            rows = {f"{key}": f"{number}-{file}" for key in range(file, 2000, file + 2)}
            path = inbox / f"{number}-{file}.csv"
            path.write_text("k,a\n" + "".join(f"{key},{value}\n" for key, value in rows.items()))
            os.utime(path, (file, file))
            expected |= rows
        both = [started(tmp_path, f"data-{each}", stderr=subprocess.PIPE) for each in range(2)]
        told = [process.communicate(timeout=120) for process in both]
        assert [process.returncode for process in both] == [0, 0], told
        names, rows_found = parsed((tmp_path / "final_clusters_data.csv").read_bytes())
        assert (names, dict(rows_found)) == (["k", "a"], expected)
        assert len(rows_found) == len(expected)
        assert json.loads((tmp_path / "merged_metadata.json").read_text())["row_count"] == len(expected)
    archived = sorted(path.name.partition(".csv.")[0] for path in (tmp_path / "csv_archive").iterdir())
    assert archived == sorted(f"{number}-{file}" for number in range(ROUNDS) for file in range(FILES))
    merged = [json.loads(path.read_text()) for path in (tmp_path / ".final_clusters_data.csv.loads").glob("*.json")]
    assert len(merged) == ROUNDS * FILES
    assert not list(inbox.iterdir())


@pytest.mark.slow
def test_a_second_run_on_the_same_state_waits_lock_timeout_seconds_and_no_longer(tmp_path: Path) -> None:
    inbox = configured(tmp_path)
    lock = tmp_path / "final_clusters_data.csv.lock"
    for wait_seconds, timeout_seconds, code in ((4, 60, 0), (60, 0.5, 2)):
        keys = {
            "checksum_wait_seconds": wait_seconds,
            "key_column": "k",
            "lock_timeout_seconds": timeout_seconds,
        }
        (tmp_path / "config.json").write_text(json.dumps(keys))
        (inbox / "1.csv").write_text("k,a\nx,1\n")
        lock.unlink(missing_ok=True)
        first = started(tmp_path, "data", stderr=subprocess.PIPE)
        while not lock.exists():
            time.sleep(0.05)
        second = started(tmp_path, "data", stderr=subprocess.PIPE)
        told = second.communicate(timeout=60)
        assert second.returncode == code, told
        if code:
            first.terminate()
        first.communicate(timeout=60)
    assert (inbox / "1.csv").exists()


@pytest.mark.slow
def test_on_a_terminal_a_bar_shows_how_far_the_merge_is_and_goes_again(tmp_path: Path) -> None:
    inbox = configured(tmp_path)
    with (inbox / "long.csv").open("w") as file:
        file.write("k,a\n")
        file.writelines(f"{number:09d},{'x' * 90}\n" for number in range(400_000))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = started(tmp_path, "data", stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        shown += piece
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, b"400000 inserted" in out) == (0, True)
    assert re.search(rb"csv_inbox: +\d+%\|.* \d+/\d+ ", shown), shown
    # The last thing is a line of blanks over the bar.
    assert shown.rstrip(b"\r\n").endswith(b" ") or shown.endswith(b"\r")
