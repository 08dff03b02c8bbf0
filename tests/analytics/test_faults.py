"""Whose fault it is when a report cannot be run: the report's, an object's, or a full disk's."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest

from app.analytics.columns import CSV, ReportFile, file_of
from app.analytics.engine import Engine, InvalidReport, UnreadableObject, literal, translate_duckdb_errors, written
from app.analytics.formats import AnswerShape
from app.analytics.queries import Queries, ReadSet
from app.analytics.reports import parse
from app.core.errors import AppError, Permanent, Transient
from app.db.state import State, open_state
from lake import Lake, exported, local_lake, parquet

START = datetime(2026, 2, 1, tzinfo=UTC)
OWN = "FROM read_parquet({{S3_PATH}})"
FULL = Path("/dev/full")
WRONG = {
    "a column that is not there": f"SELECT nocolumn {OWN}",
    "a function that is not there": f"SELECT nofunction(voltage) {OWN}",
    "a cast that fails": f"SELECT CAST(device_id AS INTEGER) AS x {OWN}",
    "a cast that fails late": "SELECT CAST(if(range < 900000, '1', 'x') AS INTEGER) AS x FROM range(1000000)",
    "types that do not fit": f"SELECT sum(device_id) {OWN}",
    "a sum that is too large": f"SELECT 9223372036854775807 + 1 + hour {OWN}",
    "two rows where one may be": f"SELECT (SELECT voltage {OWN}) AS x",
    "a wrong pattern": f"SELECT regexp_matches(device_id, '(') {OWN}",
    "an instant that is none": f"SELECT strptime(device_id, '%Y') {OWN}",
    "an instant of a text": f"SELECT epoch_us(device_id) {OWN}",
    "its own error": f"SELECT error('no') {OWN}",
}  # fmt: skip


class Counting:
    """The store, and how often it was listed."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.listings = 0

    def __getattr__(self, name: str) -> Any:
        if name in ("list", "batches"):
            self.listings += 1
        return getattr(self._store, name)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lake]:
    folder = tmp_path_factory.mktemp("lake")
    with closing(open_state("", folder)) as state, closing(local_lake(folder / "lake", state.summaries)) as made:
        made.store = Counting(made.store)
        made.summaries = made.another()
        made.queries = Queries(made.summaries, made.objects(made.engine), made.engine)
        for number in range(2):
            content = exported(f"D{number}", START, 30, draw=random.Random(number))  # noqa: S311 - test data
            made.put(f"{number}.parquet", content)
        made.summaries.refresh()
        yield made


@pytest.mark.parametrize("sql", WRONG.values(), ids=WRONG.keys())
def test_a_report_that_is_wrong_is_told_at_once_by_name(lake: Lake, sql: str) -> None:
    before = lake.store.listings  # type: ignore[attr-defined]
    with pytest.raises(Permanent, match=r"report mine\.sql cannot be run: .* Error: ") as raised:
        lake.queries.run(parse("mine", sql), {}, AnswerShape("parquet", "data"))
    assert raised.value.hint == "correct its SQL file"
    assert lake.store.listings == before  # type: ignore[attr-defined]


LATER = {
    "cut": (exported("D1", START, 30, draw=random.Random(7))[:900], 30),  # noqa: S311 - test data
    "with another kind of instants": (
        parquet({"device_id": ["D1"] * 5, "timestamp": ["2026-02-01T00:00:00Z"] * 5}),
        35,
    ),
}


@pytest.mark.parametrize(("content", "rows"), LATER.values(), ids=LATER.keys())
def test_an_object_that_does_not_fit_any_more_is_listed_and_read_again(
    content: bytes, rows: int, new_state: Callable[[str], State], tmp_path: Path
) -> None:
    with closing(local_lake(tmp_path / "lake", new_state("sqlite").summaries)) as lake:
        for number in range(2):
            lake.put(f"{number}.parquet", exported(f"D{number}", START, 30, draw=random.Random(number)))  # noqa: S311
        lake.summaries.refresh()
        lake.put("1.parquet", content)
        assert lake.from_objects("overview")[0][0] == rows


def test_no_torn_object_is_taken_for_a_wrong_report(lake: Lake) -> None:
    draw = random.Random(3)  # noqa: S311 - test data
    whole = exported("D1", START, 200, draw=draw)
    file = lake.engine.folder / "torn.parquet"
    errors = []
    for _ in range(120):
        torn = bytearray(whole)
        start = draw.randrange(4, len(torn) - 200)
        length = draw.randrange(1, 200)
        torn[start : start + length] = draw.randbytes(length)
        file.write_bytes(torn)
        try:
            lake.engine.rows(f"SELECT * FROM read_parquet({literal(str(file))})")  # noqa: S608 - its own
        except AppError as error:
            errors.append(error)
    assert len(errors) > 20
    assert [error for error in errors if isinstance(error, InvalidReport)] == []


def test_lines_that_end_in_two_ways_are_a_fault_of_the_object_and_of_no_report(lake: Lake) -> None:
    file = lake.engine.folder / "mixed.csv"
    file.write_bytes(b"a,b\r\n1,2\n3,4\r\n")
    with pytest.raises(UnreadableObject, match="not RFC 4180 compliant"):
        lake.engine.rows(f"SELECT * FROM read_csv({literal(str(file))}, {CSV}, columns = {{'a': 'INT', 'b': 'INT'}})")  # noqa: S608


class FullDisk:
    """Objects whose pins do not fit on the disk."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.opens = 0

    @contextmanager
    def opened(self, wanted: ReadSet) -> Iterator[tuple[Engine, Sequence[ReportFile]]]:
        self.opens += 1
        with written(), FULL.open("wb") as file:
            file.write(bytes(100_000))
        yield self._engine, [file_of(source.key, source.key, source.columns) for source in wanted.sources]

    def certain(self, wanted: ReadSet) -> bool:
        return bool(wanted.sources)

    def close(self) -> None:
        pass


def test_a_full_disk_is_told_at_once_and_what_to_do_about_it(lake: Lake) -> None:
    full = FullDisk(lake.engine)
    before = lake.store.listings  # type: ignore[attr-defined]
    with pytest.raises(Transient, match="No space left on device") as raised:
        Queries(lake.summaries, full, lake.engine).run(
            parse("mine", f"SELECT 1 AS x {OWN}"), {}, AnswerShape("json", "data")
        )
    assert raised.value.hint == "free space in DATA_DIR"
    assert (full.opens, lake.store.listings) == (1, before)  # type: ignore[attr-defined]


def test_a_full_disk_below_duckdb_is_told_as_such_and_is_no_fault_of_an_object() -> None:
    with pytest.raises(Transient, match="No space left on device") as raised, translate_duckdb_errors(None):
        duckdb.execute(f"COPY (SELECT * FROM range(300000)) TO '{FULL}' (FORMAT csv, USE_TMP_FILE false)")  # noqa: S608
    assert raised.value.hint == "free space in DATA_DIR"
