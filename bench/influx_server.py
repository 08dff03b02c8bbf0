"""A bench server with the subset of InfluxDB 2 that the compared programs use; serves pre-rendered bytes.

Rendering finishes before the port is announced, so the measured time includes only sending bytes, in a separate
process. Rows are kept as bytes per device and two-minute bucket; answers are chunked, in 4 KiB chunks as from a real
server, or precompressed for clients that accept that.
"""

import argparse
import gzip
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from telemetry import FIELDS, NS, START, WINDOW_SECONDS, Shape, device_name, points, tags_of

BUCKET_SECONDS = 120
BUCKETS = WINDOW_SECONDS // BUCKET_SECONDS
ROW_HEAD = (
    b"#datatype,string,long,dateTime:RFC3339,string,string,string,double,double,double,double\r\n"
    b"#group,false,false,false,true,true,true,false,false,false,false\r\n"
    b"#default,_result,,,,,,,,,\r\n"
    b",result,table,_time,device_id,device_type,location,voltage,current,power,temperature\r\n"
)
COUNT_HEAD = (
    b"#datatype,string,long,string,string,dateTime:RFC3339,long\r\n"
    b"#group,false,false,true,true,true,false\r\n"
    b"#default,_result,,,,,\r\n"
    b",result,table,device_id,_field,_time,_value\r\n"
)
NAME_HEAD = (
    b"#datatype,string,long,string\r\n#group,false,false,false\r\n#default,_result,,\r\n,result,table,_value\r\n"
)
PLAIN_HEAD = b"_time,device_id,device_type,location,voltage,current,power,temperature\n"
RANGE = re.compile(r"range\(start: ?([^,]+), stop: ?([^)]+)\)")
DEVICE = re.compile(r'device_id == "([^"]+)"')
EVERY = re.compile(r"every: (\d+)s")


@dataclass(slots=True)
class Held:
    """Everything rendered: rows by device and bucket, and how many values of each field a bucket holds."""

    shape: Shape
    rows: dict[tuple[int, int], bytes] = field(default_factory=dict)
    values: dict[tuple[int, int], Sequence[int]] = field(default_factory=dict)

    def answer(self, query: str, annotations: Sequence[str]) -> Iterator[bytes]:
        """The body for a Flux query, in pieces, with the annotations that were asked for."""
        if "schema." in query:
            names = map(device_name, range(self.shape.devices)) if "tagValues" in query else ("device_telemetry",)
            yield annotated(NAME_HEAD, annotations) + b"".join(f",,0,{name}\r\n".encode() for name in names)
        else:
            yield from self._of_range(query, annotations)
        yield b"\r\n"

    def _of_range(self, query: str, annotations: Sequence[str]) -> Iterator[bytes]:
        span, only, every = RANGE.search(query), DEVICE.findall(query), EVERY.search(query)
        if span is None:
            raise ValueError(query)
        first, last = (max(0, min(bucket_of(text), self.shape.windows * BUCKETS)) for text in span.groups())
        found = [number for number in range(self.shape.devices) if not only or device_name(number) in only]
        if "not exists" in query:
            found = []  # every point has the tag that names its device
        if every:
            counted = self._counts(found, (first, last), int(every[1]) // BUCKET_SECONDS)
            yield annotated(COUNT_HEAD, annotations) + "".join(counted).encode()
        else:
            yield annotated(ROW_HEAD, annotations)
            rows = (self.rows.get((number, bucket), b"") for number in found for bucket in range(first, last))
            if "first()" in query:  # asked whether there is anything
                yield next(filter(None, rows), b"").partition(b"\n")[0] + b"\n"
            else:
                yield from rows

    def _counts(self, devices: Sequence[int], span: tuple[int, int], every: int) -> Iterator[str]:
        table = 0
        for device in devices:
            for start in range(*span, every):
                held = [self.values.get((device, bucket)) for bucket in range(start, start + every)]
                sums = [sum(values) for values in zip(*filter(None, held), strict=True)]
                at = START + timedelta(seconds=start * BUCKET_SECONDS)
                for name, values in zip(FIELDS, sums, strict=False):
                    yield f",,{table},{device_name(device)},{name},{at:%Y-%m-%dT%H:%M:%SZ},{values}\r\n"
                    table += 1

    def plain(self) -> bytes:
        """The same data as a CSV without anything of InfluxDB: no annotations, no empty columns, LF."""
        return PLAIN_HEAD + b"".join(
            re.sub(rb"(?m)^,,\d+,", b"", rows).replace(b"\r\n", b"\n") for rows in self.rows.values()
        )


def annotated(head: bytes, annotations: Sequence[str]) -> bytes:
    """The head with only these annotations."""
    wanted = (*(f"#{name}".encode() for name in annotations), b",")
    return b"".join(line for line in head.splitlines(keepends=True) if line.startswith(wanted))


def bucket_of(text: str) -> int:
    """The number of the bucket that starts at an instant."""
    return (datetime.fromisoformat(text.strip()) - START) // timedelta(seconds=BUCKET_SECONDS)


def render(shape: Shape) -> Held:
    """All rows as bytes, with the `table` number that a server would give them in one answer over all devices."""
    held = Held(shape)
    for device in range(shape.devices):
        for window in range(shape.windows):
            render_window(held, device, window)
    return held


def render_window(held: Held, device: int, window: int) -> None:
    """Write the window's rows once and cut them at the bounds of the buckets."""
    import numpy as np

    table = points(held.shape, device, window)
    times = table.column("_time").to_numpy()
    text = csv_of(table, device)
    ends = np.append(0, np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1)
    begin_ns = (int(START.timestamp()) + window * WINDOW_SECONDS) * NS
    bounds = np.searchsorted(times, begin_ns + np.arange(BUCKETS + 1) * BUCKET_SECONDS * NS)
    for number, (low, high) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if high > low:
            slot = (device, window * BUCKETS + number)
            part = table.slice(low, high - low)
            held.rows[slot] = text[ends[low] : ends[high]]
            held.values[slot] = [part.num_rows - part.column(name).null_count for name in FIELDS]


def csv_of(table: Any, device: int) -> bytes:
    """The points as rows of annotated CSV."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as pacsv

    kind, location = tags_of(device)
    rows = table.num_rows
    columns = [
        pa.nulls(rows, pa.string()),
        pa.nulls(rows, pa.string()),
        pa.repeat(pa.scalar(device), rows),
        pc.strftime(table.column("_time").cast(pa.timestamp("ns", "UTC")), format="%Y-%m-%dT%H:%M:%SZ", locale="C"),
        *(pa.repeat(pa.scalar(text), rows) for text in (device_name(device), kind, location)),
        *(table.column(name) for name in FIELDS),
    ]
    sink = pa.BufferOutputStream()
    named = pa.table(columns, names=[f"c{number}" for number in range(len(columns))])
    pacsv.write_csv(named, sink, pacsv.WriteOptions(include_header=False, quoting_style="none"))
    text: bytes = sink.getvalue().to_pybytes()
    return text.replace(b"\n", b"\r\n")


class Answers:
    """What is handed out; compressed answers are kept, so that each is compressed once."""

    def __init__(self, held: Held, chunk_bytes: int) -> None:
        self.held = held
        self.chunk_bytes = chunk_bytes
        self.plain = held.plain()
        self._compressed: dict[tuple[str, Sequence[str]], bytes] = {}

    def compressed(self, query: str, annotations: Sequence[str]) -> bytes:
        """The whole body, gzipped as a server does it."""
        asked = (query, annotations)
        if asked not in self._compressed:
            self._compressed[asked] = gzip.compress(b"".join(self.held.answer(query, annotations)), 6)
        return self._compressed[asked]


class Exchange(BaseHTTPRequestHandler):
    """Requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def __init__(self, answers: Answers, *arguments: Any) -> None:
        self._answers = answers
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """A sign of life, or the plain CSV."""
        if self.path == "/plain":
            self._begin(200, {"Content-Type": "text/csv", "Transfer-Encoding": "chunked"})
            self._chunks(iter([self._answers.plain]))
        else:
            self._begin(204 if self.path == "/ping" else 404, {"Content-Length": "0"})

    def do_POST(self) -> None:
        """A query, compressed for who accepts that."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        query, annotations = asked["query"], tuple(asked["dialect"]["annotations"])
        headers = {"Content-Type": "text/csv; charset=utf-8", "Transfer-Encoding": "chunked"}
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            self._begin(200, {**headers, "Content-Encoding": "gzip"})
            self._chunks(iter([self._answers.compressed(query, annotations)]))
        else:
            self._begin(200, headers)
            self._chunks(self._answers.held.answer(query, annotations))

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"X-Influxdb-Version": "2.7.11", "X-Influxdb-Build": "OSS", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _chunks(self, parts: Iterator[bytes]) -> None:
        for piece in cut(parts, self._answers.chunk_bytes):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Nothing: the bench prints its tables only."""


def serve(held: Held, chunk_bytes: int) -> ThreadingHTTPServer:
    """The server on a free port of loopback."""
    return ThreadingHTTPServer(("127.0.0.1", 0), partial(Exchange, Answers(held, chunk_bytes)))


def cut(parts: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of `size`."""
    rest = b""
    for part in parts:
        held = rest + part
        whole = len(held) - len(held) % size
        yield from (held[start : start + size] for start in range(0, whole, size))
        rest = held[whole:]
    if rest:
        yield rest


def main() -> None:
    """Render, tell the port on stdout, serve until stdin is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("devices", "windows", "rows"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--chunk-bytes", type=int, default=4096)
    given = parser.parse_args()
    server = serve(render(Shape(given.devices, given.windows, given.rows)), given.chunk_bytes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
