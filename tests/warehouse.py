"""Warehouses and daemons with a warehouse for the tests of /dwh, on SQLite and on PostgreSQL."""

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl
from uuid import UUID, uuid4

import httpx
import pytest

from app.dwh.query import KeysetPosition, selection
from app.dwh.request_parsing import BatchLimits, WriteOptions, receive
from app.dwh.responses import AnswerPage
from app.dwh.tables import TABLES, Table
from app.dwh.warehouse import InsertResult, Warehouse, open_warehouse
from daemon import Daemons

AT = datetime(2026, 2, 7, 12, tzinfo=UTC)
BY_NAME = {table.name: table for table in TABLES}
LIMITS = BatchLimits(1000, 10_000_000)


def uuid_of(number: int) -> str:
    return str(UUID(int=(7 << 100) + number))


def key_of(table: Table, number: int) -> Any:
    return {"uuid": uuid_of(number), "bigint": number, "text": f"device-{number}"}[table.key.kind]


def rows_of(table: Table, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows with a value in each column, the same for the same numbers."""
    values: dict[str, Callable[[int], Any]] = {
        "text": lambda n: f"text {n} \\ \t\n'\"ü😀",
        "integer": lambda n: n - 3,
        "bigint": lambda n: 2**53 + n,
        "float": lambda n: 55.755831234567891 + n / 7,
        "bool": lambda n: n % 2 == 0,
        "json": lambda n: {"a": [1, None, {"b": f'{n} "q" \\'}], "big": 2**64 + n, "f": 0.1},
        "instant": lambda n: f"2026-02-07T12:34:{n % 60:02}.789000Z",
    }
    return [
        {column.name: key_of(table, n) if column.required else values[column.kind](n) for column in table.columns}
        for n in range(first, first + count)
    ]


SORTED = {
    "events_part": ("uuid", "event_type", "event_time", "event_id", "id", "created_at"),
    "permanent_user_properties": ("ehr_id", "cohort_week", "registered_via_app"),
    "user_locations": ("location_lat", "city"),
}


def mixed(table: Table, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """Rows with many ties and gaps in every column but the key."""
    values: dict[str, Callable[[int], Any]] = {
        "text": lambda n: ["b", "", "ä", "B,%", None][n % 5],
        "integer": lambda n: [3, -1, None][n % 3],
        "bigint": lambda n: [2**60, None, -5, 0][n % 4],
        "float": lambda n: [0.1, None, -1e300, 1 / 3, 0.1][n % 5],
        "bool": lambda n: [True, None, False][n % 3],
        "instant": lambda n: ["2026-02-07T12:34:56.000001Z", None, "1999-01-01T00:00:00Z"][n % 3],
    }
    return [
        {each.name: key_of(table, n) if each.required else values[each.kind](n) for each in table.columns}
        for n in numbers
    ]


@dataclass
class Got:
    body: bytes
    last: KeysetPosition | None


@dataclass
class Desk:
    """A warehouse with the parts of the product around it, without HTTP."""

    warehouse: Warehouse
    at: datetime = AT

    def post(
        self,
        table: Table,
        rows: Sequence[Mapping[str, Any]],
        *,
        limits: BatchLimits = LIMITS,
        skip: bool = False,
        **request: Any,
    ) -> InsertResult:
        return self.post_text(table, json.dumps({"data": rows}).encode(), limits=limits, skip=skip, **request)

    def post_text(
        self, table: Table, body: bytes, *, limits: BatchLimits = LIMITS, skip: bool = False, **request: Any
    ) -> InsertResult:
        how = WriteOptions(skip=skip, resolution=request.get("resolution"))
        sizes = {"body_bytes": 1 << 30, "stream_bytes": 1 << 30}
        with closing(receive(io.BytesIO(body), table, how, limits, **sizes)) as received:
            return self.warehouse.insert(table, received, at=self.at, **request)

    def get(self, table: Table, **params: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.read(table, **params).body)["rows"]
        return rows

    def rows(self, table: Table, given: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.read_given(table, given).body)["rows"]
        return rows

    def read(self, table: Table, **params: Any) -> Got:
        return self.read_given(table, [(name, str(value)) for name, value in params.items()])

    def read_given(self, table: Table, given: Sequence[tuple[str, str]]) -> Got:
        chosen = selection(table, given)
        with closing(AnswerPage(self.warehouse, chosen)) as page:
            page.produce()
            page.wait(whole=True)
            return Got(b"".join(page.pieces()), page.last)


def walked(desk: Desk, table: Table, limit: int, between: Callable[[], object], **params: Any) -> list[int]:
    """The ids that whoever follows the links meets; `between` happens after each page."""
    ids: list[int] = []
    given = [("limit", str(limit)), *((name, str(value)) for name, value in params.items())]
    while True:
        chosen = selection(table, given)
        page = desk.read_given(table, given)
        ids += [row["id"] for row in json.loads(page.body)["rows"]]
        if page.last is None:
            return ids
        given = parse_qsl(chosen.next_page("/dwh/x", page.last).partition("?")[2], keep_blank_values=True)
        between()


@pytest.fixture(params=["sqlite", "postgres"])
def warehouse_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/{uuid4()}/dwh.db"
    return str(request.getfixturevalue("postgres_server").new_database())


@pytest.fixture
def desk(warehouse_url: str, tmp_path: Path) -> Iterator[Desk]:
    with closing(open_warehouse(warehouse_url, tmp_path)) as warehouse:
        yield Desk(warehouse)


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One daemon per database for all tests; each test uses keys of its own. Small limits, so that they are met."""
    environ = {"MAX_BODY_BYTES": "2000000", "MAX_UPLOAD_BYTES": "60000000"}
    if request.param == "postgres":
        environ["DWH_DATABASE_URL"] = request.getfixturevalue("postgres_server").new_database()
    with ExitStack() as stack:
        daemons = stack.enter_context(closing(Daemons(tmp_path_factory.mktemp("served"))))
        daemon = daemons.start("", wait=True, key="", **environ)
        yield stack.enter_context(httpx.Client(base_url=daemon.url, timeout=30))


def ndjson(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def packed(body: bytes) -> bytes:
    return gzip.compress(body, 1)
