"""Compares the printed bill with the requests that the store received, and shows the effect of a cost cap.

    uv run python bench/bill.py [--devices 10] [--minutes 125]

The export runs once per simulated minute against a counting S3 server; each device has a new point every time. The bill
is read after ten minutes and compared with the server's count. Then the same period runs again with
MAX_MONTHLY_REQUEST_COST at a tenth of that bill. The state uses the machine's clock, so after each run its times are
set to the simulated ones.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from cost_per_device import HISTORY_MINUTES, START, Silent
from measured import Goal

SOURCE = Path(__file__).with_name("cost_per_device.py")
PRICED_MINUTES = 10
KINDS = {"PUT": "put", "POST": "put", "GET": "get", "HEAD": "get", "DELETE": "delete"}


@dataclass
class Bucket:
    """A bucket in memory that counts requests by their price class, and writes of objects."""

    held: dict[str, tuple[bytes, str, dict[str, str]]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    writes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self) -> ThreadingHTTPServer:
        """A server in a thread of this process."""
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                status, headers, body = bucket.answer(
                    self.command, self.path, dict(self.headers), self.rfile.read(length)
                )
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_PUT = do_DELETE = answer  # noqa: N815 - names of the base class

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        url = urlsplit(path)
        key = unquote(url.path).partition("/")[2].partition("/")[2]
        given = {name.lower(): value for name, value in headers.items()}
        with self.lock:
            lists = method == "GET" and "list-type" in url.query
            self.seen["list" if lists else KINDS[method]] += 1
            if lists:
                return 200, {}, self._listing(parse_qs(url.query).get("prefix", [""])[0])
            if method == "PUT":
                return self._put(key, given, body)
            if method == "DELETE":
                self.held.pop(key, None)
                return 204, {}, b""
            if key not in self.held:
                return 404, {}, b"<Error><Code>NoSuchKey</Code></Error>"
            content, etag, metadata = self.held[key]
            return 200, {"ETag": etag, **metadata, "Last-Modified": "Sat, 07 Feb 2026 12:00:00 GMT"}, content

    def _put(self, key: str, given: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        there = self.held.get(key)
        is_refused = given.get("if-none-match") == "*" and there is not None
        if "if-match" in given:
            is_refused = there is None or there[1] != given["if-match"]
        if is_refused:
            return 412, {}, b"<Error><Code>PreconditionFailed</Code></Error>"
        if "aws-chunked" in given.get("content-encoding", ""):
            body = _dechunked(body)
        etag = f'"{hashlib.md5(body).hexdigest()}"'  # noqa: S324 - as S3 does
        kept = {
            name: value for name, value in given.items() if name.startswith("x-amz-meta-") or name == "content-type"
        }
        self.held[key] = body, etag, kept
        self.writes += "/export_" in key
        return 200, {"ETag": etag}, b""

    def _listing(self, prefix: str) -> bytes:
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-02-07T12:00:00.000Z</LastModified><ETag>{escape(etag)}"
            f"</ETag><Size>{len(content)}</Size></Contents>"
            for key, (content, etag, _) in sorted(self.held.items())
            if key.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()


def _dechunked(body: bytes) -> bytes:
    found = b""
    while body:
        head, _, body = body.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        if not size:
            break
        found, body = found + body[:size], body[size + 2 :]
    return found


@dataclass(frozen=True, slots=True)
class Bill:
    """What the server counted and what was estimated after ten minutes; object writes and closed windows at the end."""

    seen: dict[str, int]
    estimated: float
    of_seen: float
    writes: int
    closed: frozenset[tuple[str, datetime]]


def export(given: argparse.Namespace, cap: float | None) -> Bill:
    """All simulated minutes."""
    from app.config.environment import load_settings
    from app.core.runs import LeaseTerms, RunServices, Stop, execute
    from app.db.state import open_state
    from app.influx_to_s3.job import NAME, build
    from app.main import open_store
    from app.object_store.request_counts import RequestCounter
    from app.object_store.set_aside import SetAsideStore, folder_of
    from app.ops.request_costs import MONTH_SECONDS, RequestCosts, load_prices

    bucket = Bucket()
    server = bucket.serve()
    command = [sys.executable, str(SOURCE), "--serve", "--devices", str(given.devices)]
    with (
        tempfile.TemporaryDirectory(prefix="headwater-bench-") as name,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child,
        closing(open_state("", Path(name))) as state,
    ):
        if child.stdout is None or child.stdin is None:
            raise AssertionError
        environ = {
            "DATA_DIR": name,
            "INFLUXDB_URL": child.stdout.readline().strip(),
            "INFLUXDB_TOKEN": "t",
            "INFLUXDB_ORG": "o",
            "INFLUXDB_BUCKET": "b",
            "EXPORT_GRACE_SECONDS": "60",
            "S3_BUCKET": "lake",
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "S3_ACCESS_KEY_ID": "any",
            "S3_SECRET_ACCESS_KEY": "any",
        }
        settings = load_settings(environ, None)
        now = [START + timedelta(minutes=HISTORY_MINUTES)]
        counter, prices = RequestCounter(), load_prices("", "us-east-1")
        store = open_store(settings, counter)
        costs = RequestCosts(counter, state.requests, prices, lambda: now[0], cap)
        job = next(
            each
            for each in build(
                settings,
                state.checkpoints,
                store,
                set_aside=SetAsideStore(store, folder_of("telemetry"), 1 << 20),
                clock=lambda: now[0],
                rewrite_seconds=costs.rewrite_seconds if cap else None,
            ).jobs
            if each.name == NAME
        )
        services = RunServices(
            lambda: datetime.now(UTC), state.leases, state.runs, LeaseTerms("bench"), lambda *_: costs.save()
        )
        estimated, seen = 0.0, dict[str, int]()
        for minute in range(given.minutes):
            child.stdin.write("1\n")
            child.stdin.flush()
            child.stdout.readline()
            now[0] += timedelta(minutes=1)
            began_at = datetime.now(UTC)
            run = execute(job, services, Stop(), Silent())
            if run is None or run.error:
                sys.exit(run.error if run else "the lease is taken")
            with state.database.transaction() as session:
                session.run(
                    "UPDATE export_windows SET updated_at = :now WHERE updated_at >= :at", now=now[0], at=began_at
                )
            if minute + 1 == PRICED_MINUTES:
                estimated, seen = costs.estimate().cost or 0.0, dict(bucket.seen)
        records = state.checkpoints.live_records(NAME, START)
        closed = frozenset(
            (device, each.window.start) for device, some in records.items() for each in some if each.closed
        )
        child.stdin.close()
    server.shutdown()
    of_seen = prices.of(seen) * MONTH_SECONDS / (PRICED_MINUTES * 60)
    return Bill(seen, estimated, of_seen, bucket.writes, closed)


def main() -> int:
    """Print both; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--minutes", type=int, default=125)
    given = parser.parse_args()
    free = export(given, None)
    capped = export(given, free.estimated / 10)
    print(f"{given.devices} devices; ten minutes: {free.seen} at the server")
    print(f"bill {free.estimated:.4f} a month, from the server's counts {free.of_seen:.4f}")
    print(f"writes of objects in {given.minutes} minutes: {free.writes}, with a cap of a tenth {capped.writes}")
    print(f"closed windows: {len(free.closed)}, with the cap {len(capped.closed)}")
    goals = [
        Goal("the bill is off by", abs(free.estimated / free.of_seen - 1) * 100, 5, at_least=False, unit=" %"),
        Goal("writes without / with a cap of a tenth", free.writes / capped.writes, 9, unit=" x"),
        Goal("windows closed by one of both only", len(free.closed ^ capped.closed), 0, at_least=False),
    ]
    print("\n" + "\n".join(f"- {goal}" for goal in goals))
    return 0 if all(goal.met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
