"""Items of every writing through the whole pipeline: each is in its hour's file once, or set aside with its text."""

import csv
import io
import json
import logging
import re
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from app.core.errors import Permanent
from app.core.ledger import ALL, Tally, fault_of
from app.core.verify import Verdict, verify
from app.core.windows import Window
from app.dynamo_to_drive import job
from app.dynamo_to_drive.table import LOOKED_ITEMS
from app.dynamo_to_drive.timestamps import NO_ATTRIBUTE, OUTSIDE, UNREADABLE
from effort import EFFORT
from shipping import START, TABLE, Shipping, item, shipping
from simulators.dynamodb import DynamoSimulator, DynamoTable

LOCAL = dict.fromkeys(
    ("GOOGLE_CREDENTIALS_JSON", "GOOGLE_DRIVE_API_URL", "GOOGLE_DRIVE_FOLDER_ID", "GOOGLE_SHARED_DRIVE_ID"), ""
)
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
BERLIN, NEW_YORK, KOLKATA = (timezone(timedelta(minutes=minutes)) for minutes in (120, -300, 330))

Value = dict[str, Any]


def iso(at: datetime, zone: timezone = UTC, form: str = "%Y-%m-%dT%H:%M:%S%:z") -> str:
    local = at.astimezone(zone)
    offset = local.isoformat()[-6:]
    return local.strftime(form.replace("%:z", offset))


def texts(at: datetime) -> Sequence[str]:
    """The writings of an instant that a sort key of text is asked for."""
    seconds = int(at.timestamp())
    return (
        iso(at, form="%Y-%m-%dT%H:%M:%SZ"),
        iso(at, form="%Y-%m-%d %H:%M:%S"),
        iso(at, form="%Y-%m-%dT%H:%M:%S.250%:z"),
        iso(at, BERLIN),
        iso(at, NEW_YORK, "%Y-%m-%d %H:%M:%S%:z"),
        iso(at, KOLKATA, "%Y-%m-%dT%H:%M:%S.5%:z"),
        iso(at, form="%Y-%m-%dt%H:%M:%Sz"),
        iso(at, form="%Y%m%dT%H%M%SZ"),
        f"{seconds}",
        f"{seconds}.5",
        f"{seconds}250",
        f"{seconds}250125",
    )


def numbers(at: datetime) -> Sequence[str]:
    """Those of a number: no two of them are the same number."""
    seconds = int(at.timestamp())
    return f"{seconds}", f"{seconds}.25", f"{seconds}250", f"{seconds}250.5", f"{seconds}250125"


@pytest.fixture
def ship(tmp_path: Path) -> Iterator[Shipping]:
    with shipping(tmp_path) as made:
        made.extra = dict(LOCAL)
        yield made


def put(ship: Shipping, *at: str, **values: str) -> None:
    """An item for each text."""
    more = {name: {"S": value} for name, value in values.items()}
    ship.put(*({"static_partition": {"S": "data"}, "datetime_utc": {"S": text}, **more} for text in at))


def rows(ship: Shipping) -> dict[str, list[dict[str, str]]]:
    """The rows of each file by its hour."""
    found = sorted((ship.folder / "drive").glob("*.csv"))
    return {path.name[-6:-4]: list(csv.DictReader(io.StringIO(path.read_text(), newline=""))) for path in found}


def stamps(ship: Shipping) -> dict[str, list[str]]:
    return {hour: [row["datetime_utc"] for row in each] for hour, each in rows(ship).items()}


def kept(ship: Shipping) -> list[dict[str, Value]]:
    """The items that were set aside, as they are kept."""
    folder = ship.folder / "objects" / "dynamo_to_drive" / "_set_aside"
    return [json.loads(line) for path in sorted(folder.rglob("*.ndjson")) for line in path.read_text().splitlines()]


def test_items_of_all_writings_in_one_partition_are_in_the_file_of_their_hour_in_order_of_time(ship: Shipping) -> None:
    expected: dict[str, list[str]] = {"11": [], "12": []}
    for minute in range(-30, 30, 5):
        for number, text in enumerate(texts(START + minute * MINUTE)):
            put(ship, text, number=str(number))
            expected[f"{START + minute * MINUTE:%H}"].append(text)
    ship.now = START + 50 * MINUTE
    report = ship.run()
    found = stamps(ship)
    assert {hour: Counter(each) for hour, each in found.items()} == {
        hour: Counter(each) for hour, each in expected.items()
    }
    assert [text[14:16] for text in found["12"] if text.endswith("Z") and text[10] == "T" and "-" in text] == [
        f"{minute:02d}" for minute in range(0, 30, 5)
    ]
    assert report.ledger.fields == {ALL: Tally(counted=144, read=144, new=144)}
    assert ship.run().ledger.fields == {ALL: Tally(counted=72, read=72, already_there=72)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "zone"),
    [
        ("%Y-%m-%d %H:%M:%S", UTC),
        ("%Y-%m-%dt%H:%M:%SZ", UTC),
        ("%Y-%m-%dT%H:%M:%S%:z", BERLIN),
        ("%Y-%m-%dT%H:%M:%S%:z", NEW_YORK),
        ("%Y%m%dT%H%M%SZ", UTC),
        ("%s", UTC),
        ("%s250", UTC),
    ],
)
def test_a_producer_that_changes_its_writing_is_noticed_by_a_process_that_goes_on(
    ship: Shipping, form: str, zone: timezone
) -> None:
    ship.put_rows(START, 5)
    ship.now = START + MINUTE
    ship.run()
    for minute in range(2, 40):
        at = START + minute * MINUTE
        text = form.replace("%s", str(int(at.timestamp())))
        put(ship, iso(at, zone, text))
    ship.now = START + 41 * MINUTE
    ship.run()
    for minute in (62, 63):  # the first run of an hour looks around, for what sorts before the newest item
        ship.now = START + minute * MINUTE
        ship.run()
    assert len(rows(ship)["12"]) == 43


@pytest.mark.slow
def test_an_hour_whose_items_all_have_an_offset_is_found_also_when_it_is_the_first_of_a_backfill(
    ship: Shipping,
) -> None:
    put(ship, *(iso(START + minute * MINUTE, BERLIN) for minute in range(0, 180, 10)))
    put(ship, *(iso(START + hours * HOUR, form="%Y-%m-%dT%H:%M:%SZ") for hours in (38, 39)))
    ship.now = START + 40 * HOUR
    ship.run()
    ship.backfill(START - 20 * HOUR, START + 20 * HOUR)
    assert {hour: len(each) for hour, each in rows(ship).items()} == {"12": 6, "13": 6, "14": 6, "02": 1, "03": 1}


@pytest.mark.slow
def test_an_hour_that_has_another_offset_among_its_own_is_found_where_later_hours_show_it(ship: Shipping) -> None:
    put(ship, *(iso(START + minute * MINUTE, form="%Y-%m-%dT%H:%M:%SZ") for minute in range(0, 40 * 60, 10)))
    put(ship, *(iso(START + minute * MINUTE, BERLIN) for minute in range(20 * 60 + 5, 30 * 60, 10)))
    ship.now = START + 41 * HOUR
    ship.extra["DRIVE_CATCHUP_HOURS"] = "1"
    ship.run()
    ship.restart()
    ship.backfill(START, START + 40 * HOUR)
    names = {path.name: path.read_bytes().count(b"\n") - 1 for path in (ship.folder / "drive").glob("*.csv")}
    assert sorted(names.values()) == [6] * 30 + [12] * 10
    with closing(ship.export()) as export:
        found = verify(export.verification(ship.stop), Window(START, START + 40 * HOUR), ship.stop)
        assert {each.sign for each in found} == {Verdict.EQUAL}


@pytest.mark.slow
def test_hours_are_read_again_until_no_later_one_shows_another_writing(ship: Shipping) -> None:
    """The last hour has an offset. Only with that the second one is looked around, which shows the small t."""
    first, second, third = (datetime(2026, 2, day, hour, tzinfo=UTC) for day, hour in ((3, 8), (5, 0), (6, 0)))
    ship.now = START
    put(ship, iso(START - 20 * MINUTE, form="%Y-%m-%dT%H:%M:%SZ"))  # the newest item and the first one are plain
    put(ship, *(iso(at, form="%Y-%m-%dT%H:%M:%SZ") for at in (first - 72 * HOUR, first, second, third)))
    ship.backfill(first, second)  # nothing but plain ones: these hours are not looked around any more
    ship.backfill(second + HOUR, third)
    put(ship, *(iso(at + MINUTE, form="%Y-%m-%dt%H:%M:%SZ") for at in (first, second)))
    put(ship, iso(third + MINUTE, timezone(MINUTE)))
    ship.backfill(first, third + HOUR)
    names = {path.name: path.read_bytes().count(b"\n") - 1 for path in (ship.folder / "drive").glob("*.csv")}
    assert names == {f"locness_data_{at:%Y%m%d_%H}.csv": 2 for at in (first, second, third)}


def test_rows_that_an_earlier_version_put_by_their_local_hour_go_to_their_own(ship: Shipping) -> None:
    text = iso(START - 30 * MINUTE, BERLIN)
    folder = ship.folder / "drive"
    folder.mkdir()
    wrong = folder / "locness_data_20260207_13.csv"
    gone = iso(START - 20 * MINUTE, BERLIN)
    wrong.write_bytes(f"datetime_utc,temp\r\n{gone},1\r\n{text},1\r\n2026-02-07T13:59:00Z,kept\r\n".encode())
    put(ship, text, temp="1")
    put(ship, "2026-02-07T13:10:00Z", temp="2")
    ship.extra["DRIVE_CATCHUP_HOURS"] = "3"
    ship.now = START + 80 * MINUTE
    report = ship.run()
    # What the table no longer has stays where it is: it would be lost otherwise.
    assert stamps(ship) == {"11": [text], "13": [gone, "2026-02-07T13:10:00Z", "2026-02-07T13:59:00Z"]}
    assert report.ledger.total == Tally(counted=2, read=2, new=2)


def test_items_that_cannot_be_read_are_set_aside_once_with_their_text_and_the_others_land(
    ship: Shipping, caplog: pytest.LogCaptureFixture
) -> None:
    ship.put_rows(START, 5)
    put(ship, "2026-02-07T12:61:00Z", note="secret")
    put(ship, "yesterday", "tomorrow", note="secret")
    ship.now = START + 5 * MINUTE
    with caplog.at_level(logging.DEBUG, "app"):
        report = ship.run()
    assert len(rows(ship)["12"]) == 5
    assert sorted(each["datetime_utc"]["S"] for each in kept(ship)) == ["2026-02-07T12:61:00Z", "tomorrow", "yesterday"]
    assert all(each["note"] == {"S": "secret"} for each in kept(ship))
    (aside,) = report.ledger.set_aside
    assert (aside.reason, aside.number, aside.new) == (UNREADABLE, 3, 3)
    assert report.ledger.total == Tally(counted=8, read=8, new=5, set_aside=3)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert lines.count("an item is set aside: unreadable timestamp, 8 characters, 3 attributes") == 1
    assert not any("secret" in line or "yesterday" in line for line in lines)
    again = ship.run()
    assert [(each.number, each.new) for each in again.ledger.set_aside] == [(3, 0)]
    assert fault_of(again.ledger) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "07.02.2026 12:10:00",
        "02/07/2026 12:10",
        " 2026-02-07T12:10:00Z",
        "+1770466200",
        "01770466200",
        "1.7704662E9",
        "2026-02-07",
        "2026-02-07 noon",
        "2026-02-07T24:00:00Z",
    ],
)
def test_what_sorts_before_all_good_items_or_between_them_is_set_aside_as_well(ship: Shipping, text: str) -> None:
    ship.put_rows(START, 5)
    put(ship, text)
    ship.now = START + 30 * MINUTE
    assert ship.run().ledger.total == Tally(counted=6, read=6, new=5, set_aside=1)
    assert [each["datetime_utc"]["S"] for each in kept(ship)] == [text]


def test_a_bad_item_alone_in_its_hour_stops_nothing(ship: Shipping) -> None:
    ship.put_rows(START - 2 * HOUR, 5)
    put(ship, "2026-02-07T11:61:00Z")
    ship.put_rows(START, 5)
    ship.now = START + 30 * MINUTE
    assert ship.run().ledger.total == Tally(counted=11, read=11, new=10, set_aside=1)
    assert ship.checkpoints.cursors(job.NAME)[TABLE] == START


def test_more_bad_items_behind_all_good_ones_than_are_looked_at_stop_no_hour_without_items(ship: Shipping) -> None:
    put(ship, iso(START - 30 * HOUR), *(f"noon {number}" for number in range(LOOKED_ITEMS + 1)))
    for _ in range(2):
        assert ship.run().ledger.total.set_aside == LOOKED_ITEMS
    assert stamps(ship) == {}


def test_a_table_in_which_nothing_can_be_read_is_a_failure_and_the_cursor_stays(ship: Shipping) -> None:
    put(ship, *(f"07.02.2026 12:{minute:02d}" for minute in range(20)))
    ship.now = START + 30 * MINUTE
    with pytest.raises(Permanent, match="20 items read, none has a datetime_utc that can be read, for example") as stop:
        ship.run()
    assert "DYNAMODB_TIMESTAMP_ATTRIBUTE" in stop.value.hint
    assert ship.checkpoints.cursors(job.NAME)[TABLE] == START - 2 * HOUR


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "looks", "digits"), [("s", "ms", 1000), ("ms", "s", 1), ("ms", "us", 1_000_000)])
@pytest.mark.parametrize("letter", ["N", "S"])
def test_a_wrong_unit_is_named_by_the_run_and_by_check(
    tmp_path: Path, letter: str, unit: str, looks: str, digits: int
) -> None:
    with shipping(tmp_path, types=("S", letter)) as ship:
        ship.extra = {**LOCAL, "DYNAMODB_TIMESTAMP_UNIT": unit}
        for number in range(5):
            at = str(int((START + number * MINUTE).timestamp()) * digits)
            ship.put({"static_partition": {"S": "data"}, "datetime_utc": {letter: at}})
        ship.now = START + 30 * MINUTE
        for attempt in (ship.run, ship.ping):
            with pytest.raises(Permanent, match=f"is in the unit {looks}") as refused:
                attempt()
            assert f"set DYNAMODB_TIMESTAMP_UNIT to {looks}" in refused.value.hint
        ship.extra["DYNAMODB_TIMESTAMP_UNIT"] = "auto"
        assert ship.run().rows == 5
        assert ship.ping() == "may describe and query; the table"


@pytest.mark.parametrize("is_scanned", [False, True])
def test_a_date_that_was_taken_for_seconds_lies_ahead_and_is_told_by_the_run_and_by_check(
    tmp_path: Path,
    is_scanned: bool,  # noqa: FBT001 - pytest gives it by name
) -> None:
    key = ("static_partition", "id") if is_scanned else ("static_partition", "datetime_utc")
    with shipping(tmp_path, key=key, types=("S", "N")) as ship:
        ship.extra = dict(LOCAL)
        right = {"N": str(int((START + 29 * MINUTE).timestamp()))}
        items = ({"N": "2026020712"}, right)  # the first one means 12:00, and is read as a second of 2034
        for number, at in enumerate(items):
            ship.put({"static_partition": {"S": "data"}, "datetime_utc": at, "id": {"N": str(number)}})
        ship.now = START + 30 * MINUTE
        report = ship.run()
        assert report.rows == 1
        assert any("datetime_utc 2026020712 is in the future" in note for note in report.notes)
        assert "datetime_utc 2026020712 is in the future" in ship.ping()


def test_an_empty_table_is_well_and_partition_values_that_nothing_has_are_not(ship: Shipping) -> None:
    ship.now = START + 30 * MINUTE
    assert ship.run().ledger.total == Tally()
    put(ship, "2026-02-07T12:00:00Z")
    ship.extra["DYNAMODB_PARTITION_VALUES"] = "dat,dta"
    for attempt in (ship.run, ship.ping):
        with pytest.raises(Permanent, match="no item has static_partition 'dat' or 'dta'; values seen: data") as stop:
            attempt()
        assert "DYNAMODB_PARTITION_VALUES" in stop.value.hint


def test_one_partition_value_that_nothing_has_is_named_and_the_others_land(ship: Shipping) -> None:
    put(ship, "2026-02-07T12:00:00Z")
    ship.now = START + 30 * MINUTE
    ship.extra["DYNAMODB_PARTITION_VALUES"] = "data,dta"
    said = "no item has static_partition 'dta': check DYNAMODB_PARTITION_VALUES"
    report = ship.run()
    assert (report.rows, list(report.notes)) == (1, [said])
    assert ship.ping().endswith(said)


def test_a_scan_whose_items_all_lack_the_attribute_is_a_failure_that_names_those_there_are(ship: Shipping) -> None:
    ship.extra["DYNAMODB_TIMESTAMP_ATTRIBUTE"] = "measured"
    ship.now = START + 30 * MINUTE
    assert ship.run().ledger.total == Tally()
    ship.put_rows(START, 20)
    expected = "20 items read, none has measured; attributes seen: datetime_utc, static_partition, temp"
    for attempt in (ship.run, ship.ping):
        with pytest.raises(Permanent) as stop:
            attempt()
        assert stop.value.message == expected
    ship.put({**item(START + 30 * MINUTE), "measured": {"S": "2026-02-07T12:30:00Z"}})
    report = ship.run()
    assert [(each.reason, each.new) for each in report.ledger.set_aside] == [(NO_ATTRIBUTE, 20)]
    assert len(rows(ship)["12"]) == 1
    assert (
        ship.export()
        .ping_table()
        .endswith("20 timestamps cannot be read: attributes datetime_utc, static_partition, temp")
    )


def test_what_became_of_each_item_is_in_the_ledger(ship: Shipping) -> None:
    ship.put_rows(START, 10)
    ship.now = START + 5 * MINUTE
    dry = ship.run(dry_run=True)
    assert dry.ledger.total == Tally(counted=10, read=10, waiting=10)
    ship.run()
    ship.put(item(START, temp="corrected"), item(START + 4 * MINUTE, temp="new"))
    table = ship.dynamo._tables[TABLE]  # noqa: SLF001 - time to live has no call of its own
    for key in list(table.items)[3:6]:
        del table.items[key]
    report = ship.run()
    assert report.ledger.total == Tally(counted=8, read=8, new=1, already_there=6, corrected=1)
    assert len(rows(ship)["12"]) == 11
    assert report.ledger.partitions.keys() == {TABLE}


@contextmanager
def simulated(key: Sequence[tuple[str, str]], items: Sequence[dict[str, Value]]) -> Iterator[dict[str, str]]:
    """A table of the demo's simulator, as the variables that name it."""
    names, letters = zip(*key, strict=True)
    with DynamoSimulator([DynamoTable(TABLE, names, letters)]) as dynamo:
        dynamo.put(TABLE, items)
        yield {"DYNAMODB_ENDPOINT_URL": dynamo.url}


@contextmanager
def in_moto(key: Sequence[tuple[str, str]], items: Sequence[dict[str, Value]]) -> Iterator[dict[str, str]]:
    """A table of an independent DynamoDB."""
    server = ThreadedMotoServer(port=0)
    server.start()
    url, name = f"http://127.0.0.1:{server.get_host_and_port()[1]}", f"all_{'_'.join(map(str, key))}"
    name = re.sub(r"[^a-z_SN]", "", name)
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    client = boto3.client("dynamodb", endpoint_url=url, **keys)
    kinds = zip(key, ("HASH", "RANGE"), strict=False)
    client.create_table(
        TableName=name,
        KeySchema=[{"AttributeName": each, "KeyType": kind} for (each, _), kind in kinds],
        AttributeDefinitions=[{"AttributeName": each, "AttributeType": letter} for each, letter in key],
        BillingMode="PAY_PER_REQUEST",
    )
    for begin in range(0, len(items), 25):
        batch = [{"PutRequest": {"Item": in_python(each)}} for each in items[begin : begin + 25]]
        assert not client.batch_write_item(RequestItems={name: batch})["UnprocessedItems"]
    client.close()
    try:
        yield {"DYNAMODB_ENDPOINT_URL": url, "DYNAMODB_TABLE_NAME": name}
    finally:
        server.stop()


def in_python(item: dict[str, Value]) -> dict[str, Value]:
    """As boto3 takes it: binaries are bytes."""
    return {name: {"B": b64decode(value["B"])} if "B" in value else value for name, value in item.items()}


def items_of(letter: str, number: int) -> list[dict[str, Value]]:
    """Items over three hours in every writing; `letter` "" = in an attribute that is no key, so some lack it."""
    made: list[dict[str, Value]] = []
    for count in range(number):
        at = START - 2 * HOUR + timedelta(seconds=count * 3 * 3600 // number)
        own: dict[str, Value] = {"id": {"S": f"{count:05d}"}, "hour": {"S": f"{at:%H}"}}
        if letter == "N":
            value: Value | None = {"N": numbers(at)[count % 5]}
        elif letter == "S" or count % 2:
            value = {"S": texts(at)[count % 12]}
        else:
            value = {"N": numbers(at)[count % 5]}
        if count % 10 == 9:
            value = bad(letter, at, count)
            own["hour"] = {"S": "none"}
        made.append(
            {**own, **({"static_partition": {"S": "data"}} if letter else {}), **({"at": value} if value else {})}
        )
    return made


def bad(letter: str, at: datetime, count: int) -> Value | None:
    """A timestamp that cannot be read, of a kind that the way to read the table meets."""
    if letter == "N":
        return {"N": f"{9 * 10**20 + count}"}  # behind all others, where the newest items are looked at
    if letter == "S":
        return {"S": f"{at:%Y-%m-%dT%H:%M}:{60 + count % 40}.{count}Z"} if count % 20 == 9 else {"S": f"~{count}"}
    wrong: Sequence[Value | None] = (
        None,
        {"S": f"no {count}"},
        {"NULL": True},
        {"BOOL": True},
        {"B": "MTc3MDQ2NTYwMA=="},
    )
    return (*wrong, {"L": [{"N": "1770465600"}]}, {"N": f"{count}"}, {"S": ""})[count // 10 % 8]


WAYS = pytest.mark.parametrize("letter", ["S", "N", ""], ids=["query of text", "query of numbers", "scan"])


@WAYS
def test_of_all_items_each_is_in_the_file_of_its_hour_once_or_set_aside(tmp_path: Path, letter: str) -> None:
    each_is_somewhere(tmp_path, letter, simulated, 1200)


@pytest.mark.slow
@pytest.mark.timeout(600)
@WAYS
def test_of_thousands_of_items_each_is_in_the_file_of_its_hour_once_or_set_aside(tmp_path: Path, letter: str) -> None:
    each_is_somewhere(tmp_path, letter, in_moto, 1_500 * EFFORT)


def each_is_somewhere(
    folder: Path,
    letter: str,
    serve: Callable[..., AbstractContextManager[dict[str, str]]],
    number: int,
) -> None:
    items = items_of(letter, number)
    key = [("static_partition", "S"), ("at", letter)] if letter else [("id", "S")]
    with serve(key, items) as variables, shipping(folder) as ship:
        ship.extra = {**LOCAL, **variables, "DYNAMODB_TIMESTAMP_ATTRIBUTE": "at"}
        ship.now = START + 59 * MINUTE
        report = ship.run()
        found = {hour: Counter(row["id"] for row in each) for hour, each in rows(ship).items()}
        aside = Counter(each["id"]["S"] for each in kept(ship))
        expected = {hour: Counter[str]() for hour in ("10", "11", "12", "none")}
        for each in items:
            expected[each["hour"]["S"]][each["id"]["S"]] += 1
        assert aside == expected.pop("none")
        assert found == expected
        total = Tally(counted=number, read=number, new=number * 9 // 10, set_aside=number // 10)
        assert report.ledger.total == total
        assert {each.reason for each in report.ledger.set_aside} == {
            "S": {UNREADABLE},
            "N": {OUTSIDE},
            "": {NO_ATTRIBUTE, UNREADABLE, OUTSIDE},
        }[letter]
