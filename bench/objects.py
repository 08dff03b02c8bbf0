"""/s3 versus boto3's own transfer, up and down, and a one-byte patch versus get, splice and put, in turns.

    uv run python bench/objects.py [--mb 1024] [--repeat 5] [--slow-seconds 10]

The store is SeaweedFS from its wheel, on this machine; its own work takes most of the time, equally for all ways.
Headwater's way is curl and the daemon together; its memory is the daemon's peak above the idle daemon. boto3's way is
`upload_file` and `download_file` with default settings. At the end, 50 slow clients send and read while /health is
probed.
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import daemon as daemons
import seaweed
from measured import Cost, Goal, in_turns, run, table
from object_clients import KEY, waits

MIB = 1 << 20
SLOW_CLIENTS = 50
WAYS = Path(__file__).with_name("object_ways.py")
TICKS = os.sysconf("SC_CLK_TCK")
Ways = Mapping[str, Callable[[], Cost]]


def main() -> int:
    """Print times and ratios; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--slow-seconds", type=float, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "sent", given.mb)
        with seaweed.running(folder, seaweed.free_ports(2 * len(seaweed.SERVICES))) as store:
            started = daemons.Daemons(folder)
            try:
                goals = measure(folder, store, started, given)
            finally:
                started.close()
    for goal in goals:
        print(goal)
    return 0 if all(goal.met for goal in goals) else 1


def write(path: Path, mb: int) -> None:
    """A file that no two blocks of are alike, the same each time."""
    block = hashlib.shake_256(b"headwater").digest(MIB)
    with path.open("wb") as file:
        for number in range(mb):
            file.write(number.to_bytes(8) + block[8:])


def measure(folder: Path, store: seaweed.Seaweed, started: daemons.Daemons, given: argparse.Namespace) -> list[Goal]:
    """All comparisons on one store."""
    bucket = store.new_bucket()
    environ = {
        "S3_BUCKET": bucket,
        "S3_ENDPOINT_URL": store.endpoint_url,
        "S3_ACCESS_KEY_ID": store.access_key,
        "S3_SECRET_ACCESS_KEY": store.secret_key,
        "S3_ADDRESSING_STYLE": "path",
    }
    served = started.start("", wait=True, key="", **environ)
    served.until(lambda: served.get("/ready").json["checks"]["s3_accessible"], 60)
    served.get("/s3/objects")
    sent, back, middle = folder / "sent", folder / "back", given.mb * MIB // 2

    def boto(what: str) -> Cost:
        return run([sys.executable, str(WAYS), what, store.endpoint_url, bucket, str(sent), str(middle)], keys(store))

    def ours(path: str, *curl: str) -> Cost:
        return through(served, [f"{served.url}/s3/{path}", *curl])

    upload = f"upload?key={KEY}"
    up: Ways = {
        "boto3 up": lambda: boto("up"),
        "/s3/upload, form": lambda: ours(upload, "-F", f"file=@{sent}"),
        "/s3/upload, bare": lambda: ours(upload, "-X", "POST", "-T", str(sent)),
    }
    costs = dict(in_turns(up, given.repeat))
    down: Ways = {
        "boto3 down": lambda: boto("down"),
        "/s3/download": lambda: ours(f"download?key={KEY}", "-o", str(back)),
    }
    costs |= in_turns(down, given.repeat)
    if digest(sent) != digest(back):
        sys.exit("what came back is not what was sent")
    patch: Ways = {
        "get, splice, put": lambda: boto("splice"),
        "/s3/patch": lambda: ours(f"patch?key={KEY}&offset={middle}", "-X", "PATCH", "--data-binary", "x"),
    }
    costs |= in_turns(patch, max(given.repeat // 2, 1))
    print(f"{given.mb} MiB\n{table(costs)}")
    for clients in (0, SLOW_CLIENTS):
        taken = waits(served.port, clients, given.slow_seconds)
        print(f"/health beside {clients} slow clients: p50 {taken.p50_ms:.1f} ms, p99 {taken.p99_ms:.1f} ms")
    return goals_of(costs)


def goals_of(costs: Mapping[str, Cost]) -> list[Goal]:
    """The figures of the specification."""
    up, bare, down, patch = (
        costs[name] for name in ("/s3/upload, form", "/s3/upload, bare", "/s3/download", "/s3/patch")
    )
    return [
        Goal("upload of a form, boto3's time / ours", costs["boto3 up"].wall_seconds / up.wall_seconds, 0.85),
        Goal("upload of bare bytes, boto3's time / ours", costs["boto3 up"].wall_seconds / bare.wall_seconds, 0.85),
        Goal("download, boto3's time / ours", costs["boto3 down"].wall_seconds / down.wall_seconds, 0.85),
        Goal("upload, above idle", up.peak_mib, 64, at_least=False, unit=" MiB"),
        Goal("download, above idle", down.peak_mib, 16, at_least=False, unit=" MiB"),
        Goal("patch, above idle", patch.peak_mib, 32, at_least=False, unit=" MiB"),
        Goal("patch, get-splice-put's time / ours", costs["get, splice, put"].wall_seconds / patch.wall_seconds, 3),
    ]


def through(served: daemons.Daemon, arguments: list[str]) -> Cost:
    """curl against the daemon: CPU of both, peak memory of the daemon above what it had before."""
    (process := Path(f"/proc/{served.process.pid}")).joinpath("clear_refs").write_text("5")
    before_mib, cpu = served.rss_mib, cpu_seconds(process)
    began = time.monotonic()
    cost = run(["curl", "-sS", "--fail", "-H", "Expect:", *arguments])
    wall = time.monotonic() - began
    peak = next(int(line.split()[1]) for line in (process / "status").read_text().splitlines() if "VmHWM" in line)
    return Cost(cost.cpu_seconds + cpu_seconds(process) - cpu, wall, peak / 1024 - before_mib)


def cpu_seconds(process: Path) -> float:
    """What the process has used so far."""
    fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def keys(store: seaweed.Seaweed) -> dict[str, str]:
    """As the SDK reads them."""
    return {
        "AWS_ACCESS_KEY_ID": store.access_key,
        "AWS_SECRET_ACCESS_KEY": store.secret_key,
        "AWS_REGION": "us-east-1",
    }


def digest(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
