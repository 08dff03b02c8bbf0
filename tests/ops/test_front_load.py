"""The short form of `bench/front.py`, whose whole form takes minutes and wants a machine for itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
RATIO = "p99 of /health against a bare application"  # of two processes, which others on this machine disturb unequally


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_bad_connections_cost_those_that_work_nothing() -> None:
    command = [sys.executable, str(BENCH / "front.py"), "--minutes", "0.75", "--bad", "500", "--clients", "32"]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, timeout=240, check=False)
    missed = [line for line in done.stdout.splitlines() if "MISSED" in line and RATIO not in line]
    assert missed == [], done.stdout + done.stderr
    (p99_ms,) = re.findall(r"\| daemon \| [\d.]+ \| ([\d.]+) \|", done.stdout)
    assert float(p99_ms) < 1000
