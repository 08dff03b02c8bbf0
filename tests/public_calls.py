"""The requests whose answers are in the snapshots, in this order: each route once, and each way to be refused."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    method: str
    path: str
    sent: dict[str, Any]


def call(line: str, **sent: Any) -> Call:
    method, path = line.split()
    return Call(method, path, sent)


FROM_TO = {"from": "2026-02-09T12:00:00Z", "to": "2026-02-09T13:00:00Z"}
ROW = {"uuid": "0b1c6a6e-7c1d-4f2a-9d57-2f6f0a9a1b11", "event_type": "open"}
BAD_ROW = {**ROW, "event_id": "x"}
WANTED = {"resource": "events", "date_since": "2026-02-09", "date_until": "2026-02-09"}
TEXT = {"Content-Type": "text/plain"}
DEVICE = "telemetry/device_id%3DD1/date%3D2026/02/09/export_120000.parquet"

CALLS = (
    *(call(f"GET {path}") for path in ("/health", "/ready", "/", "/analytics/explore", "/docs", "/redoc", "/nowhere")),
    *(call(f"GET /ops/{name}") for name in ("session", "jobs", "runs", "partitions", "history")),
    call("GET /ops/gaps?job=influx_to_s3&to=2026-02-09T12:30:00Z&hours=1"),
    call("GET /ops/gaps?job=csv_inbox"),
    call("GET /ops/gaps?job=influx_to_s3&hours=x"),
    call("POST /ops/session", json={"key": "wrong"}),
    call("DELETE /ops/session"),
    *(call(f"POST /ops/jobs/csv_inbox/{name}") for name in ("run", "resume", "pause")),
    call("POST /ops/jobs/nonsense/run"),
    call("POST /ops/jobs/influx_to_s3/backfill", json=FROM_TO),
    call("POST /ops/jobs/influx_to_s3/heal", json=FROM_TO),
    call("POST /ops/jobs/csv_inbox/backfill", json=FROM_TO),
    call("POST /dwh/events-part", json={"data": [ROW]}),
    call("POST /dwh/events-part?on_error=skip", json={"data": [BAD_ROW]}),
    call("POST /dwh/events-part", json={"data": [BAD_ROW]}),
    call("POST /dwh/events-part", content=b"x", headers=TEXT),
    *(call(f"GET /dwh/events-part?limit=1&format={name}") for name in ("json", "csv", "ndjson", "parquet")),
    call("PUT /dwh/events-part"),
    *(call(f"GET /amplitude/export?start=20260209&end=20260209&source={name}") for name in ("web", "mobile")),
    call("GET /appmetrica/ping"),
    call("POST /appmetrica/exports", json=WANTED),
    call("GET /appmetrica/fetch-export?export_id=999"),
    call("POST /s3/upload?key=notes/a.txt", content=b"abc", headers=TEXT),
    call("POST /s3/upload?key=telemetry/a.txt", content=b"abc"),
    call("PUT /s3/update?key=notes/a.txt", content=b"abcd"),
    call("PATCH /s3/patch?key=notes/a.txt&offset=1", content=b"xy"),
    call("GET /s3/objects?prefix=notes/"),
    *(call(f"GET /s3/object-info?key={key}") for key in ("notes/a.txt", "notes/none.txt", DEVICE)),
    call("GET /s3/download?key=notes/a.txt"),
    call("HEAD /s3/download?key=notes/a.txt", headers={"Range": "bytes=0-1"}),
    call("GET /s3/link?key=notes/a.txt"),
    call("GET /s3/shared?key=notes/a.txt&expires=1&signature=x"),
    call("DELETE /s3/delete?key=notes/a.txt", headers={"If-Match": '"x"'}),
    call("DELETE /s3/delete?key=notes/a.txt"),
    call("DELETE /s3/delete?key=notes/a.txt"),
    call("GET /analytics"),
    call("GET /analytics/schema"),
    *(call(f"GET /analytics/{name}") for name in ("overview", "daily-summary", "devices", "over-time")),
    *(call(f"GET /analytics/devices/latest?format={name}") for name in ("json", "csv", "parquet", "xlsx")),
    call("GET /analytics/over-time?minutes=x"),
)
