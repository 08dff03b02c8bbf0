"""CPU of one small write: a put into a directory or a bucket, a commit of one record.

`uv run python bench/small_puts.py [--store local|s3|sqlite] [--puts 500] [--rounds 5]`: a line of JSON with the CPU
time per write in µs, the least of all blocks of 50 writes: `new` for keys in folders of their own, `replaced` for the
same keys under the condition of their version, `head` for their properties; for SQLite `together` for many commits at
once. The S3 server (SeaweedFS) is another process, so the time is that of the program alone, system calls included.
With `TMPDIR=/dev/shm` nothing waits for a disk.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

METADATA = {
    "pipeline": "influx_to_s3",
    "window": "2026-02-07T11:00:00Z/2026-02-07T12:00:00Z",
    "rows": "60",
    "digest": "d" * 64,
    "app-version": "1.0",
    "timestamp-unit": "us",
    "tags": "all",
    "write": "0123456789abcdef0123456789abcdef:17",
}
PARQUET = "application/vnd.apache.parquet"
BLOCK = 50
START = datetime(2026, 2, 7, 11, tzinfo=UTC)


@contextmanager
def store_of(name: str, folder: Path) -> Iterator[Any]:
    """An empty store that was probed."""
    from app.object_store.local import LocalDirectory
    from app.object_store.s3 import S3Store

    if name == "local":
        local = LocalDirectory(folder / "objects")
        local.probe()
        yield local
        return
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from seaweed import SERVICES, free_ports, running, target

    with (
        running(folder, free_ports(2 * len(SERVICES))) as server,
        closing(S3Store(target(server, server.new_bucket()), "telemetry/.headwater-probe/bench")) as store,
    ):
        store.probe()
        yield store


def of_store(name: str, folder: Path, puts: int, rounds: int) -> dict[str, float]:
    """µs per put and head."""
    from app.object_store.port import PutRequest

    body = os.urandom(7000)
    least: dict[str, float] = {}
    with store_of(name, folder) as store:
        for round_ in range(rounds):
            keys = [
                f"telemetry/device_id=D{round_}{at:05d}/date=2026/02/07/export_110000.parquet" for at in range(puts)
            ]
            etags = dict.fromkeys(keys, "")

            def put(key: str, etags: dict[str, str] = etags) -> None:
                etags[key] = store.put(key, io.BytesIO(body), PutRequest(PARQUET, METADATA, etags[key]))

            for step, call in (("new", put), ("replaced", put), ("head", store.head)):
                least[step] = min(least.get(step, float("inf")), per_call(call, keys))
    return least


def of_commits(folder: Path, commits: int, rounds: int) -> dict[str, float]:
    """µs per commit of one record, and per record where a transaction has as many as `commits`."""
    from app.core.pipeline import Commit, Record, Sums
    from app.core.windows import Window
    from app.db.state import open_state

    fields = dict.fromkeys(("current", "power", "temperature", "voltage"), 60)
    sums = {name: Sums(values, 12.5, 0.25, 3.5, 12.5) for name, values in fields.items()}
    window = Window(START, START + timedelta(hours=1))
    least: dict[str, float] = {}
    with closing(open_state("", folder)) as state:
        lease = state.leases.acquire("bench", "bench", 600.0)
        if lease is None:
            raise AssertionError

        def commit_of(device: str) -> tuple[str, Commit]:
            key = f"telemetry/device_id={device}/date=2026/02/07/export_110000.parquet"
            record = Record(
                window,
                0,
                key,
                '"1-1-7000"',
                "d" * 64,
                60,
                7000,
                240,
                window.start,
                window.start,
                closed=False,
                fields=fields,
                source_digest="d" * 64,
                sums=sums,
            )
            return device, Commit([record], window.start)

        for round_ in range(rounds):
            devices = [f"D{round_}{at:05d}" for at in range(commits)]
            all_of_them = list(map(commit_of, devices))

            def commit(device: str) -> None:
                state.checkpoints.commit("influx_to_s3", *commit_of(device), lease)

            def commit_all(some: list[tuple[str, Commit]]) -> None:
                state.checkpoints.commit_all("influx_to_s3", some, lease)

            for step in ("new", "replaced"):
                least[step] = min(least.get(step, float("inf")), per_call(commit, devices))
            together = per_call(commit_all, [all_of_them]) / commits
            least["together"] = min(least.get("together", float("inf")), together)
    return least


def per_call(call: Callable[[Any], Any], given: list[Any]) -> float:
    """CPU of this process in µs per item, the least of all blocks."""
    least = float("inf")
    for start in range(0, len(given), BLOCK):
        some = given[start : start + BLOCK]
        began = time.process_time()
        for each in some:
            call(each)
        least = min(least, (time.process_time() - began) / len(some) * 1e6)
    return least


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("local", "s3", "sqlite"), default="local")
    parser.add_argument("--puts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as folder:
        if given.store == "sqlite":
            least = of_commits(Path(folder), given.puts, given.rounds)
        else:
            least = of_store(given.store, Path(folder), given.puts, given.rounds)
    sys.stdout.write(json.dumps({"store": given.store, **{step: round(us) for step, us in least.items()}}) + "\n")


if __name__ == "__main__":
    main()
