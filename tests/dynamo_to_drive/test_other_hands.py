"""What others do to table, credentials, files and folder: each row has its place, or the run says so."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from app.core.errors import Permanent, Transient
from app.core.runs import Report
from shipping import KEY, START, TABLE, Shipping, item, shipping
from simulators.drive import DriveFault, DriveSimulator
from simulators.drive_files import GOOGLE_TYPES
from simulators.dynamodb import DynamoSimulator, DynamoTable
from simulators.google_oauth import JSON
from simulators.http_server import Answer, Request

HOUR_12, HOUR_13 = "locness_data_20260207_12.csv", "locness_data_20260207_13.csv"
LOCKED = DriveFault(403, "cannotModifyContentRestrictedFile", "The content of this file is restricted.")


@pytest.fixture
def ship(tmp_path: Path) -> Iterator[Shipping]:
    with shipping(tmp_path) as made:
        made.now = START + timedelta(minutes=5)
        yield made


def rows_of(ship: Shipping, name: str = HOUR_12) -> int:
    return len(ship.text(name).splitlines()) - 1


def said(report: Report, text: str) -> bool:
    return any(text in note for note in report.notes)


def test_a_table_made_anew_under_the_name_is_read_by_its_own_key_and_loses_no_row(ship: Shipping) -> None:
    def at(second: int) -> dict[str, dict[str, str]]:
        return {"datetime_utc": {"S": f"2026-02-07T12:00:{second:02d}Z"}}

    ship.dynamo.make(DynamoTable(TABLE, ("id",), ("S",)))
    ship.put({"id": {"S": "1"}, **at(1)}, {"id": {"S": "2"}, **at(2)})
    ship.run()
    assert rows_of(ship) == 2
    ship.dynamo.make(DynamoTable(TABLE, ("device", "number"), ("S", "N")))
    ship.put(*({"device": {"S": device}, "number": {"N": number}, **at(3)} for device in "ab" for number in "123"))
    assert ship.run().ledger.total.new == 6
    assert rows_of(ship) == 2 + 6
    ship.dynamo.make(DynamoTable(TABLE, KEY, ("S", "S")))  # empty, and queried from now on
    assert ship.run().ledger.total.counted == 0
    assert rows_of(ship) == 2 + 6
    ship.put(item(START, temp="1"))
    ship.restart()
    assert ship.run().ledger.total.new == 1


def test_an_older_copy_of_the_table_takes_no_row_out_of_the_file(ship: Shipping) -> None:
    ship.put_rows(START, 9)
    ship.run()
    older = DynamoTable(TABLE, KEY, ("S", "S"))
    older.put(item(START, temp="old"))
    ship.dynamo.make(older)
    report = ship.run()
    assert rows_of(ship) == 9
    assert "temp\r\n2026-02-07T12:00:00Z,old\r\n" in ship.text(HOUR_12)
    assert (report.ledger.total.counted, report.ledger.total.corrected) == (1, 1)


def test_rows_that_the_table_dropped_stay_beside_as_many_new_ones(ship: Shipping) -> None:
    ship.put_rows(START, 9)
    ship.run()
    other = DynamoTable(TABLE, KEY, ("S", "S"))
    for second in (0, 1, 3, 5, 7, 9, 11, 13, 15, 16):
        other.put(item(START + timedelta(seconds=second), temp="1"))
    ship.dynamo.make(other)
    assert ship.run().ledger.total.new == 8
    assert rows_of(ship) == 9 + 8


def test_rows_whose_timestamp_somebody_cut_or_wrote_anew_are_named_and_not_kept(ship: Shipping) -> None:
    ship.put_rows(START, 3)
    ship.run()
    before = ship.text(HOUR_12)
    for edited in (before[:-15], before.replace("2026-02-07T12:00:0", "7 Feb, noon and ")):
        (file,) = ship.drive.named(HOUR_12)
        ship.drive.state.files.change(file.file_id, content=edited.encode())
        ship.restart()
        assert said(ship.run(), "of the file have no timestamp, such as ")
        assert ship.text(HOUR_12) == before


def of_partition(value: str, second: int, temp: str) -> dict[str, dict[str, str]]:
    return {**item(START + timedelta(seconds=second), temp=temp), "static_partition": {"S": value}}


def test_other_partition_values_double_no_row_and_lose_none(ship: Shipping) -> None:
    ship.put(of_partition("data", 1, "1"), of_partition("data", 2, "2"), of_partition("other", 2, "2"))
    ship.put(of_partition("other", 3, "9"))
    ship.run()
    assert ship.text(HOUR_12).splitlines()[1:] == ["2026-02-07T12:00:01Z,1", "2026-02-07T12:00:02Z,2"]
    ship.extra["DYNAMODB_PARTITION_VALUES"] = "other,data"
    assert ship.run().ledger.total.already_there == 2
    assert ship.text(HOUR_12).splitlines() == [
        "datetime_utc,static_partition,temp",
        "2026-02-07T12:00:01Z,data,1",
        "2026-02-07T12:00:02Z,data,2",
        "2026-02-07T12:00:02Z,other,2",
        "2026-02-07T12:00:03Z,other,9",
    ]
    ship.extra["DYNAMODB_PARTITION_VALUES"] = "data"
    assert ship.run().ledger.total.already_there == 2
    assert ship.text(HOUR_12).splitlines()[1:] == [
        "2026-02-07T12:00:01Z,,1",
        "2026-02-07T12:00:02Z,,2",
        "2026-02-07T12:00:02Z,other,2",
        "2026-02-07T12:00:03Z,other,9",
    ]
    ship.put(of_partition("data", 3, "7"))  # the file's row of this second is of another partition
    assert (ship.run().ledger.total.new, ship.run().ledger.total.already_there) == (1, 3)
    assert ship.text(HOUR_12).splitlines()[-2:] == ["2026-02-07T12:00:03Z,,7", "2026-02-07T12:00:03Z,other,9"]


def test_of_several_rows_of_a_key_those_that_the_table_has_in_another_form_are_left_out(ship: Shipping) -> None:
    ship.dynamo.make(DynamoTable(TABLE, ("id",), ("S",)))
    ship.put(*({"id": {"S": each}, **item(START, temp=f"{each}.50")} for each in "123"))
    ship.run()
    assert rows_of(ship) == 3
    ship.dynamo.make(DynamoTable(TABLE, KEY, ("S", "S")))  # from now on one row a second
    ship.put({"id": {"S": "2"}, **item(START, temp="2.50")})
    ship.run()
    assert rows_of(ship) == 3
    (file,) = ship.drive.named(HOUR_12)
    edited = ship.text(HOUR_12).replace("2026-02-07T12:00:00Z", "2026-02-07 12:00:00").replace(".50", ".5")
    ship.drive.state.files.change(file.file_id, content=edited.encode())
    assert ship.run().ledger.total.already_there == 1
    found = [line.split(",") for line in ship.text(HOUR_12).splitlines()[1:]]
    assert sorted(each[1] for each in found) == ["1", "2", "3"]
    assert ["2026-02-07T12:00:00Z", "2", "2.50"] in [[each[0], each[1], each[-1]] for each in found]


def test_one_instant_in_two_writings_is_two_rows_also_when_the_table_drops_one(ship: Shipping) -> None:
    texts = ["2026-02-07T12:00:00Z", "2026-02-07T12:00:00.000Z"]
    ship.put(*({**item(START, temp="1"), "datetime_utc": {"S": text}} for text in texts))
    ship.run()
    table = DynamoTable(TABLE, KEY, ("S", "S"))
    table.put({**item(START, temp="1"), "datetime_utc": {"S": texts[1]}})
    table.put(item(START + timedelta(seconds=9), temp="2"))
    ship.dynamo.make(table)
    assert not ship.run().notes
    assert rows_of(ship) == 3
    (file,) = ship.drive.named(HOUR_12)  # but what an editor wrote in another form is the table's row
    edited = ship.text(HOUR_12).replace("00:09Z", "00:09.0Z")
    ship.drive.state.files.change(file.file_id, content=edited.encode())
    assert said(ship.run(), "are in the table with their timestamp in another form")


def test_an_hour_that_grows_downloads_its_file_once_a_run(ship: Shipping) -> None:
    ship.put_rows(START, 3)
    ship.run()
    (file,) = ship.drive.named(HOUR_12)
    for count in range(1, 4):
        ship.drive.state.asked.clear()
        ship.put(item(START + timedelta(minutes=count), temp="1"))
        assert ship.run().ledger.total.new == 1
        download_and_check = [f"GET /drive/v3/files/{file.file_id}"] * 2
        upload = f"PATCH /upload/drive/v3/files/{file.file_id}"
        assert [each for each in ship.drive.state.asked if file.file_id in each] == [*download_and_check, upload]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("Z,", ".000Z,", "are in the table with their timestamp in another form, such as '2026-02-07T12:00:00.000Z'"),
        (
            "T12:00:00Z,15.000",
            " 12:00:00,15",
            "1 rows of the file are in the table with their timestamp in another form",
        ),
        ("datetime_utc", "time", "3 rows of the file have no timestamp, such as ''"),
        (",", ";", "3 rows of the file have no timestamp, such as ''"),
    ],
)
def test_a_file_that_a_spreadsheet_saved_in_its_own_way_doubles_no_row(
    ship: Shipping, old: str, new: str, why: str
) -> None:
    ship.put_rows(START, 3)
    ship.run()
    before = ship.text(HOUR_12)
    (file,) = ship.drive.named(HOUR_12)
    ship.drive.state.files.change(file.file_id, content=before.replace(old, new).encode())
    ship.restart()
    assert said(ship.run(), why)
    assert ship.text(HOUR_12) == before


def test_a_row_of_the_file_with_another_value_stays_beside_that_of_the_table(ship: Shipping) -> None:
    ship.put_rows(START, 3)
    ship.run()
    (file,) = ship.drive.named(HOUR_12)
    edited = ship.text(HOUR_12) + "2026-02-07T12:00:02.000Z,99\r\n"
    ship.drive.state.files.change(file.file_id, content=edited.encode())
    ship.restart()
    ship.run()
    assert "12:00:02.000Z,99" in ship.text(HOUR_12)
    assert rows_of(ship) == 4


def test_credentials_that_are_renewed_where_they_lie_are_read_by_the_next_run(
    ship: Shipping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    ship.extra |= {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}

    def renew(key: str) -> None:
        ship.dynamo.access_key_id = key
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = x\n")

    renew("first")
    ship.put_rows(START, 2)
    ship.run()
    ship.dynamo.access_key_id = "second"
    ship.put_rows(START, 3)
    with pytest.raises(Permanent, match="UnrecognizedClientException"):
        ship.run()
    renew("second")
    ship.run()
    assert rows_of(ship) == 3


def test_a_google_sheet_with_the_name_and_the_properties_of_a_file_is_left_alone(ship: Shipping) -> None:
    ship.put_rows(START, 2)
    ship.run()
    files = ship.drive.state.files
    (ours,) = ship.drive.named(HOUR_12)
    sheet = {
        "id": "1sheet",
        "name": HOUR_12,
        "parent": ours.parent,
        "drive_id": ours.drive_id,
        "mime_type": f"{GOOGLE_TYPES}spreadsheet",
        "properties": ours.properties,
    }
    before = files.add(sheet)
    ship.put_rows(START, 3)
    ship.run()
    assert rows_of(ship) == 3
    files.change(ours.file_id, trashed=True)
    ship.run()
    assert rows_of(ship) == 3
    files.change(ship.drive.named(HOUR_12)[-1].file_id, mime_type=f"{GOOGLE_TYPES}spreadsheet")
    ship.run()
    assert rows_of(ship) == 3
    assert files.held["1sheet"] == before


def test_a_folder_in_the_trash_takes_no_file_and_each_run_says_so_until_it_is_back(ship: Shipping) -> None:
    ship.put_rows(START, 2)
    ship.run()
    files = ship.drive.state.files
    files.change(ship.drive.folder_id, trashed=True)
    for _ in range(2):
        with pytest.raises(Permanent, match="in the trash"):
            ship.run()
    assert len(files.held) == 4  # two roots, the folder, the file
    files.change(ship.drive.folder_id, trashed=False)
    ship.put_rows(START, 3)
    ship.run()
    assert rows_of(ship) == 3


def test_a_file_that_is_locked_waits_alone_and_is_right_once_it_is_open(ship: Shipping) -> None:
    ship.put_rows(START, 2)
    ship.run()
    ship.put_rows(START, 3)
    ship.put_rows(START + timedelta(hours=1), 4)
    locked = ship.drive.named(HOUR_12)[0].file_id
    ship.drive.add_fault(LOCKED, f"PATCH .*{locked}", times=2)
    ship.now = START + timedelta(hours=1, minutes=30)
    for rows in (4, 6):
        ship.put_rows(START + timedelta(hours=1), rows)
        (failure,) = ship.run().failures
        assert "restricted" in failure.message
        assert (rows_of(ship), rows_of(ship, HOUR_13)) == (2, rows)
    ship.put_rows(START + timedelta(hours=1), 7)
    assert not ship.run().failures
    assert (rows_of(ship), rows_of(ship, HOUR_13)) == (3, 7)


def test_an_older_revision_that_a_person_restored_is_made_right_and_what_it_lacks_is_told(ship: Shipping) -> None:
    ship.put_rows(START, 2)
    ship.run()
    (older,) = ship.drive.named(HOUR_12)
    ship.put_rows(START, 6)
    ship.run()
    ship.drive.state.files.change(older.file_id, content=older.content)
    report = ship.run()
    assert rows_of(ship) == 6
    assert said(report, f"{HOUR_12}: 4 rows were taken out by a person")
    assert not ship.run().notes


@pytest.mark.slow
def test_a_table_that_throttles_behind_a_first_page_lands_nothing_of_the_hour_until_it_is_read_whole(
    ship: Shipping,
) -> None:
    ship.put(*(item(START + timedelta(seconds=n), temp=f"{n:0400000d}") for n in range(5)))
    ship.dynamo.refuses_to_go_on = "ProvisionedThroughputExceededException"
    with pytest.raises(Transient, match=ship.dynamo.refuses_to_go_on) as told:
        ship.run()
    assert "read capacity" in told.value.hint
    assert ship.files == {}
    ship.dynamo.refuses_to_go_on = ""
    assert ship.run().ledger.total.new == 5
    assert rows_of(ship) == 5


@pytest.mark.slow
def test_a_look_for_other_writings_that_failed_is_made_again(ship: Shipping) -> None:
    """The newest and the first item tell nothing of an offset in between."""
    between = {**item(START, temp="2"), "datetime_utc": {"S": "2026-02-07T07:01:00-05:00"}}
    ship.put(item(START - timedelta(days=9), temp="0"), item(START + timedelta(minutes=2), temp="3"), between)
    ship.put(*(item(START - timedelta(hours=6, seconds=n), temp=f"{n:0400000d}") for n in range(5)))  # a second page
    ship.dynamo.refuses_to_go_on = "ProvisionedThroughputExceededException"
    with pytest.raises(Transient):
        ship.run()
    ship.dynamo.refuses_to_go_on = ""
    ship.run()
    assert rows_of(ship) == 2


def test_a_folder_that_moved_to_another_shared_drive_is_looked_up_after_one_failed_run(ship: Shipping) -> None:
    ship.extra["GOOGLE_SHARED_DRIVE_ID"] = ""
    ship.put_rows(START, 2)
    ship.run()
    files, state = ship.drive.state.files, ship.drive.state
    state.shared_drive = "0AOTHER"  # the process has the id of the one before
    for moved in (ship.drive.folder_id, ship.drive.named(HOUR_12)[0].file_id):
        files.change(moved, drive_id="0AOTHER")
    ship.put_rows(START, 3)
    ship.put_rows(START - timedelta(hours=1), 2)
    failed = ship.run().failures
    assert ["Shared drive not found: 0ADEMO" in each.message for each in failed] == [True]
    ship.put_rows(START + timedelta(hours=1), 4)
    ship.now = START + timedelta(hours=1, minutes=5)
    ship.run()
    assert (rows_of(ship), rows_of(ship, HOUR_13)) == (3, 4)
    assert {file.drive_id for file in files.matching(lambda file: file.is_binary)} == {"0AOTHER"}


def test_the_file_of_an_hour_that_a_person_named_like_another_hour_keeps_its_rows_apart(ship: Shipping) -> None:
    ship.put_rows(START, 2)
    ship.run()
    (first,) = ship.drive.named(HOUR_12)
    files = ship.drive.state.files
    files.change(first.file_id, name=HOUR_13)
    copy = {"id": "1copy", "name": HOUR_13, "parent": first.parent, "drive_id": first.drive_id}
    files.add({**copy, "mime_type": "text/csv", "properties": first.properties}, first.content)
    ship.put_rows(START, 3)
    ship.put_rows(START + timedelta(hours=1), 4)
    ship.now = START + timedelta(hours=1, minutes=5)
    for _ in range(2):
        ship.run()
    renamed, theirs, own = ship.drive.named(HOUR_13)
    assert (renamed.file_id, theirs.file_id) == (first.file_id, "1copy")
    assert renamed.content.decode().splitlines()[1:] == [f"2026-02-07T12:00:0{2 * n}Z,15.00{n}" for n in range(3)]
    assert theirs.content == first.content
    assert own.content.decode().splitlines()[1:] == [f"2026-02-07T13:00:0{2 * n}Z,15.00{n}" for n in range(4)]
    assert ship.drive.named(HOUR_12) == []


def test_other_escaping_of_formulas_doubles_no_row_and_changes_none_that_only_the_file_has(ship: Shipping) -> None:
    def table(*ids: str) -> None:
        ship.dynamo.make(DynamoTable(TABLE, ("id",), ("S",)))
        ship.put(*({"id": {"S": each}, **item(START, temp="1")} for each in ids))

    table("@a", "'b", "=gone")
    for escape in ("false", "true", "false"):
        ship.extra["CSV_ESCAPE_FORMULAS"] = escape
        ship.run()
        guard = "'" * (escape == "true")
        found = [line.split(",")[1] for line in ship.text(HOUR_12).splitlines()[1:]]
        assert sorted(found) == sorted(f"{guard}{each}" for each in ("@a", "'b", "=gone"))
        table("@a", "'b")


def test_values_of_a_binary_partition_key_are_set_as_text_or_as_they_are_said_in_base64(ship: Shipping) -> None:
    ship.dynamo.make(DynamoTable(TABLE, ("device", "datetime_utc"), ("B", "S")))
    ship.put({**item(START, temp="1"), "device": {"B": "AAH/"}}, {**item(START, temp="2"), "device": {"B": "ZDE="}})
    for wrong, told in (("base64:AAH", "base64:AAH: invalid base64"), ("data", r"seen: base64:AAH/, base64:ZDE=")):
        ship.extra["DYNAMODB_PARTITION_VALUES"] = wrong
        with pytest.raises(Permanent, match=told):
            ship.run()
    written = "datetime_utc,static_partition,temp\r\n2026-02-07T12:00:00Z,data,1\r\n"
    for value, temp in (("base64:AAH/", "1"), ("d1", "2")):
        ship.extra |= {"DYNAMODB_PARTITION_VALUES": value, "CSV_NAME_PREFIX": f"temp_{temp}"}
        ship.run()
        assert ship.text(f"temp_{temp}_20260207_12.csv") == written.replace("Z,data,1", f"Z,data,{temp}")


class ForeignDrive(DriveSimulator):
    """Answers the next request for files with `told`, as something between this machine and Drive may; does something
    before the next download.
    """

    told: bytes = b""
    before_download: Callable[[], object] | None = None

    def respond(self, request: Request) -> Answer:
        if request.path.startswith("/drive/v3/files") and self.told:
            told, self.told = self.told, b""
            return Answer(200, JSON, told)
        if request.parameters.get("alt") == "media" and self.before_download:
            act, self.before_download = self.before_download, None
            act()
        return super().respond(request)


@pytest.mark.parametrize("told", [b"{}", b"[]", b'{"id": 1, "ids": []}', b'{"files": [{}]}', b'{"files": 1}', b"null"])
def test_an_answer_that_is_not_of_drive_is_asked_for_again(tmp_path: Path, told: bytes) -> None:
    with DynamoSimulator([DynamoTable(TABLE, KEY, ("S", "S"))]) as dynamo, ForeignDrive() as drive:
        ship = Shipping(dynamo, drive, tmp_path, START + timedelta(minutes=5))
        ship.put_rows(START, 2)
        drive.told = told
        assert not ship.run().failures
        assert rows_of(ship) == 2
        ship.put_rows(START, 3)
        drive.told = told
        assert not ship.run().failures
        assert rows_of(ship) == 3
        ship.restart()


def test_a_file_that_a_person_changes_or_deletes_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    with DynamoSimulator([DynamoTable(TABLE, KEY, ("S", "S"))]) as dynamo, ForeignDrive() as drive:
        ship = Shipping(dynamo, drive, tmp_path, START + timedelta(minutes=5))
        ship.put_rows(START, 2)
        ship.run()
        (file,) = drive.named(HOUR_12)
        added = file.content + b"2026-02-07T12:04:00Z,99\r\n"
        drive.before_download = lambda: drive.state.files.change(file.file_id, content=added)
        ship.put_rows(START, 3)
        assert not ship.run().failures
        assert rows_of(ship) == 4
        drive.before_download = lambda: drive.state.files.delete(file.file_id)
        ship.put_rows(START, 5)
        assert not ship.run().failures
        assert rows_of(ship) == 5
        ship.restart()
