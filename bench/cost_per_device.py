"""Cost of one run of `influx_to_s3` per device: CPU of the program alone, transactions, objects, memory.

`uv run python bench/cost_per_device.py [--devices 1000] [--state postgres] [--store s3] [--phases first,idle,all]`
`uv run python bench/cost_per_device.py --devices 400 --query-ms 15 --put-ms 30 [--concurrency 2]`: devices a minute.

Each device has one point of four fields per minute, and a history of 65 minutes. Phases: `first`, both windows of each
device; `idle`, nothing new; `all`, a new point from every device; `tenth`, one from a tenth of them. A number of phases
of one name gives as many lines. The source, PostgreSQL and the S3 server (SeaweedFS) are separate processes, so the CPU
time is that of the program; a latency is a pause, which costs none.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

FIELDS = ("voltage", "current", "power", "temperature")
START = datetime(2026, 2, 7, 10, tzinfo=UTC)
HISTORY_MINUTES = 65
COUNTED = "#datatype,string,long,string,string,dateTime:RFC3339,long\r\n#group,false,false,true,true,true,false\r\n"
COUNTED += "#default,_result,,,,,\r\n,result,table,device_id,_field,_time,_value\r\n"
ROWS = "#datatype,string,long,dateTime:RFC3339,string,string,string,double,double,double,double\r\n"
ROWS += "#group,false,false,false,true,true,true,false,false,false,false\r\n#default,_result,,,,,,,,,\r\n"
ROWS += ",result,table,_time,device_id,device_type,location,voltage,current,power,temperature\r\n"
PHASES = {"first": 0.0, "idle": 0.0, "all": 1.0, "tenth": 0.1}
"""The share of devices that has a new point before the run."""
NAMES = "#datatype,string,long,string\r\n#group,false,false,false\r\n#default,_result,,\r\n,result,table,_value\r\n"


def stamp(seconds: float) -> str:
    """Seconds since the epoch as Flux writes them."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


@dataclass
class Devices:
    """The source's points: device n has one a minute from `start_at` on, `minutes[n]` of them."""

    minutes: list[int]
    start_at: datetime = START

    def answer(self, query: str) -> str:
        """Annotated CSV for the few questions of the export."""
        if "schema." in query:
            names = (f"D{at:06d}" for at in range(len(self.minutes))) if "tagValues" in query else ("device_telemetry",)
            return NAMES + "".join(f",,0,{name}\r\n" for name in names)
        bounds = re.search(r"range\(start: ?([^,]+), stop: ?([^)]+)\)", query)
        if bounds is None:
            return NAMES
        start, end = (datetime.fromisoformat(each).timestamp() for each in bounds.groups())
        named, every = re.findall(r'device_id == "D(\d+)"', query), re.search(r"every: (\d+)s", query)
        numbers = list(map(int, named)) or range(len(self.minutes))
        if every:
            return COUNTED + "".join(self._counts(numbers, start, end, int(every[1])))
        return ROWS + "".join(row for at in numbers for row in self._rows(at, start, end)) if named else NAMES

    def _span(self, at: int, start: float, end: float) -> range:
        first = self.start_at.timestamp() + at % 50
        low, high = (max(0, -(-int(each - first) // 60)) for each in (start, end))
        return range(low, max(low, min(self.minutes[at], high)))

    def _counts(self, numbers: Any, start: float, end: float, every: int) -> Iterator[str]:
        for at in numbers:
            bucket = start // every * every
            while bucket < end:
                number = len(self._span(at, max(start, bucket), min(end, bucket + every)))
                for field in FIELDS if number else ():
                    yield f",,0,D{at:06d},{field},{stamp(bucket)},{number}\r\n"
                bucket += every

    def _rows(self, at: int, start: float, end: float) -> Iterator[str]:
        for minute in self._span(at, start, end):
            time_at = stamp(self.start_at.timestamp() + at % 50 + 60 * minute)
            values = (
                f"{230 + (minute * 13 + at) % 100 / 10},{1 + minute % 7 / 10},{450 + minute % 90},{20 + minute % 30}"
            )
            yield f",,0,{time_at},D{at:06d},pump,P{at % 7},{values}\r\n"


def serve(source: Devices, query_ms: float) -> None:
    """The source, in a process of its own. A line on stdin `share` gives that share of the devices a new point each."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # as Go's servers: otherwise each answer waits 40 ms for an acknowledgement
        wbufsize = 1 << 16

        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["query"]
            time.sleep(query_ms / 1000)
            self._send(200, (source.answer(query) + "\r\n").encode())

        def do_GET(self) -> None:
            self._send(404, b"{}")

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"http://127.0.0.1:{server.server_address[1]}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        for at in range(len(source.minutes)):
            source.minutes[at] += at % 1000 < float(line) * 1000
        sys.stdout.write("ok\n")
        sys.stdout.flush()


class Counted:
    """Counts the calls of what it stands for, and waits before each `put`."""

    def __init__(self, inner: Any, put_ms: float = 0.0) -> None:
        self._inner, self._put_ms = inner, put_ms
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **named: Any) -> Any:
            self.calls[name] += 1
            if name == "put":
                time.sleep(self._put_ms / 1000)
            return found(*args, **named)

        return call


class Silent:
    """Progress that nobody sees."""

    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Nobody looks."""


@contextmanager
def state_of(name: str) -> Iterator[str]:
    """The URL of an empty state: "" for SQLite, otherwise a PostgreSQL server of its own."""
    if name == "sqlite":
        yield ""
        return
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from postgres import running_postgres

    with running_postgres() as server:
        yield server.new_database()


@contextmanager
def store_of(name: str, folder: Path) -> Iterator[dict[str, str]]:
    """The settings of an empty store: a directory, or a bucket of an S3 server of its own."""
    if name == "local":
        yield {}
        return
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from seaweed import SERVICES, free_ports, running

    with running(folder, free_ports(2 * len(SERVICES))) as server:
        yield {
            "S3_BUCKET": server.new_bucket(),
            "S3_ENDPOINT_URL": server.endpoint_url,
            "S3_ADDRESSING_STYLE": "path",
            "S3_ACCESS_KEY_ID": server.access_key,
            "S3_SECRET_ACCESS_KEY": server.secret_key,
        }


def seed(checkpoints: Any, lease: Any, devices: int) -> None:
    """Records of the devices outside the tenth, as if an earlier run had written their open windows."""
    from app.core.pipeline import Commit, Record
    from app.core.windows import Window
    from app.influx_to_s3.job import NAME

    window = Window(START + timedelta(hours=1), START + timedelta(hours=2))
    points = HISTORY_MINUTES - 60
    fields, cells = dict.fromkeys(FIELDS, points), points * len(FIELDS)
    digest = "d" * 64

    def commit_of(at: int) -> tuple[str, Commit]:
        record = Record(
            window,
            0,
            f"telemetry/device_id=D{at:06d}/date=2026/02/07/export_110000.parquet",
            f'"{at:x}-1"',
            digest,
            points,
            5000,
            cells,
            window.start,
            window.end,
            closed=False,
            fields=fields,
            source_digest=digest,
        )
        return f"D{at:06d}", Commit([record], window.start)

    others = (at for at in range(devices) if at % 1000 >= PHASES["tenth"] * 1000)
    while some := list(islice(others, 1000)):
        checkpoints.commit_all(NAME, list(map(commit_of, some)), lease)


def measure(url: str, child: Any, given: argparse.Namespace, folder: Path) -> None:
    """One line of JSON per phase."""
    from app.ops.process import share_the_machine, tune

    tune()
    share_the_machine()
    from app.analytics.object_facts import TableSums
    from app.config.environment import load_settings
    from app.core.runs import LeaseTerms, RunServices, Stop, execute
    from app.db.state import open_state
    from app.influx_to_s3.job import NAME, ObjectSums, build
    from app.main import open_store
    from app.object_store.request_counts import RequestCounter
    from app.object_store.set_aside import SetAsideStore, folder_of

    environ = {"DATA_DIR": str(folder), "INFLUXDB_URL": url, "INFLUXDB_TOKEN": "t", "INFLUXDB_ORG": "o"}
    environ |= {"INFLUXDB_BUCKET": "b", "INFLUXDB_TIMEOUT_SECONDS": "600"}
    environ["EXPORT_CONCURRENCY"] = str(given.concurrency)
    environ["EXPORT_START"] = (START + timedelta(minutes=given.start_minute)).isoformat()
    now = [START + timedelta(minutes=HISTORY_MINUTES)]
    with ExitStack() as stack:
        state = stack.enter_context(closing(open_state(stack.enter_context(state_of(given.state)), folder)))
        settings = load_settings({**environ, **stack.enter_context(store_of(given.store, folder))}, None)
        store: Any = Counted(open_store(settings, RequestCounter()), given.put_ms)
        shared: Any = state.database
        transaction, transactions = shared.transaction, Counter[str]()

        def counted(**how: bool) -> Any:
            transactions["all"] += 1
            return transaction(**how)

        shared.transaction = counted  # each is counted, whoever makes it
        export = build(
            settings,
            state.checkpoints,
            store,
            set_aside=SetAsideStore(store, folder_of("telemetry"), 1 << 20),
            clock=lambda: now[0],
            sums=ObjectSums(TableSums, state.summaries),
        )
        job = next(job for job in export.jobs if job.name == NAME)
        services = RunServices(
            lambda: datetime.now(UTC), state.leases, state.runs, LeaseTerms("bench"), lambda *_: None
        )
        if given.reports:
            state.summaries.note_asked()
        if given.seed:
            seed(state.checkpoints, state.leases.acquire("seed", "bench", 600), given.devices)
        for phase in given.phases.split(","):
            child.stdin.write(f"{PHASES[phase]}\n")
            child.stdin.flush()
            child.stdout.readline()
            now[0] += timedelta(minutes=1)
            store.calls.clear()
            transactions.clear()
            used, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
            rows = objects = runs = 0
            while (run := execute(job, services, Stop(), Silent())) is not None:
                rows, objects, runs = rows + run.report.rows, objects + run.report.windows, runs + 1
                if not run.report.more:
                    break
            wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
            cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
            told = {
                "phase": phase,
                "outcome": run.outcome.value if run else "",
                "error": run.error if run else "",
                "runs": runs,
                "rows": rows,
                "objects": objects,
                "cpu_seconds": round(cpu, 2),
                "cpu_ms_an_object": round(1000 * cpu / objects, 2) if objects else None,
                "wall_seconds": round(wall, 2),
                "devices_a_minute": round(60 * objects / wall),
                "transactions": transactions["all"],
                "puts": store.calls["put"],
                "peak_mib": after.ru_maxrss // 1024,
            }
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--query-ms", type=float, default=0.0)
    parser.add_argument("--put-ms", type=float, default=0.0)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--start-minute", type=int, default=0, help="60: without the first hour")
    parser.add_argument("--seed", action="store_true", help="with --start-minute 60: only a tenth is really new")
    parser.add_argument("--reports", action="store_true", help="/analytics is in use: open objects are summed, too")
    parser.add_argument("--state", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--store", choices=("local", "s3"), default="local")
    parser.add_argument("--phases", default="first,idle,all,tenth", help=f"of {', '.join(PHASES)}, in any order")
    parser.add_argument("--serve", action="store_true")
    given = parser.parse_args()
    if given.serve:
        serve(Devices([HISTORY_MINUTES] * given.devices), given.query_ms)
        return
    command = [sys.executable, __file__, "--serve", "--devices", str(given.devices), "--query-ms", str(given.query_ms)]
    with (
        tempfile.TemporaryDirectory(prefix="headwater-bench-") as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child,
    ):
        if child.stdout is None or child.stdin is None:
            raise AssertionError
        measure(child.stdout.readline().strip(), child, given, Path(folder))
        child.stdin.close()


if __name__ == "__main__":
    main()
