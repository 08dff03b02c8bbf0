"""What stands on Drive after runs at several times, whatever rows, people and restarts did in between."""

import csv
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from app.core.errors import Permanent, Stopped, Transient
from app.core.windows import Window
from app.dynamo_to_drive import job
from shipping import START, Shipping, item, shipping
from simulators.drive import DriveFault

HOUR_11, HOUR_12 = "locness_data_20260207_11.csv", "locness_data_20260207_12.csv"
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)


def google_variables() -> tuple[str, ...]:
    return "GOOGLE_CREDENTIALS_JSON", "GOOGLE_DRIVE_API_URL", "GOOGLE_DRIVE_FOLDER_ID", "GOOGLE_SHARED_DRIVE_ID"


@pytest.fixture
def ship(tmp_path: Path) -> Iterator[Shipping]:
    with shipping(tmp_path) as made:
        yield made


def test_the_current_hour_is_one_file_with_header_timestamp_first_and_others_in_order(ship: Shipping) -> None:
    ship.put(item(START, temp="15.0", salinity="35.10"), item(START + 2 * MINUTE, temp="15.1", ph_total="8.1"))
    ship.now = START + 5 * MINUTE
    report = ship.run()
    assert ship.text(HOUR_12) == (
        "datetime_utc,ph_total,salinity,temp\r\n2026-02-07T12:00:00Z,,35.10,15.0\r\n2026-02-07T12:02:00Z,8.1,,15.1\r\n"
    )
    assert (report.rows, report.windows) == (2, 1)


def test_an_unchanged_hour_is_not_uploaded_again(ship: Shipping) -> None:
    ship.put_rows(START, 10)
    ship.now = START + 5 * MINUTE
    ship.run()
    version = ship.drive.named(HOUR_12)[0].version
    assert ship.run().windows == 0
    ship.restart()
    assert ship.run().windows == 0
    assert ship.drive.named(HOUR_12)[0].version == version


def test_a_row_five_minutes_late_for_the_last_hour_is_in_its_file_after_the_next_run(ship: Shipping) -> None:
    ship.put_rows(START, 10)
    ship.now = START + 63 * MINUTE
    ship.run()
    ship.put(item(START + 59 * MINUTE, temp="9"))
    ship.now = START + 65 * MINUTE
    ship.run()
    assert "2026-02-07T12:59:00Z,9" in ship.text(HOUR_12)


def test_a_row_that_is_overwritten_upstream_is_right_after_the_next_run(ship: Shipping) -> None:
    ship.put(item(START, temp="1"))
    ship.now = START + MINUTE
    ship.run()
    ship.put(item(START, temp="2"))
    ship.run()
    assert ship.text(HOUR_12) == "datetime_utc,temp\r\n2026-02-07T12:00:00Z,2\r\n"


def test_a_restart_just_before_the_hour_ends_leaves_both_files_right(ship: Shipping) -> None:
    ship.put_rows(START + 58 * MINUTE, 30)
    ship.now = START + 59 * MINUTE + timedelta(seconds=30)
    ship.run()
    ship.restart()
    ship.put_rows(START + 59 * MINUTE, 30)
    ship.put_rows(START + 60 * MINUTE, 10)
    ship.now = START + 62 * MINUTE
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 61
    assert len(ship.text("locness_data_20260207_13.csv").splitlines()) == 11


def test_rows_after_the_grace_are_found_by_the_late_job_and_counted(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 30 * MINUTE
    ship.run()
    ship.now = START + 75 * MINUTE
    ship.run()
    ship.put(item(START + 50 * MINUTE, temp="9"), item(START, temp="corrected"))
    assert ship.run().windows == 0
    report = ship.run(job.LATE)
    assert (report.windows, report.rows) == (1, 6)
    assert (report.written_new_rows, report.late_rows, report.corrected_rows) == (1, 1, 1)
    assert "T12:50:00Z,9" in ship.text(HOUR_12)
    assert ship.run(job.LATE).windows == 0


def test_rows_after_the_grace_are_found_also_where_only_a_scan_serves(ship: Shipping) -> None:
    ship.extra["DYNAMODB_TIMESTAMP_ATTRIBUTE"] = "measured"

    def put(minutes: int) -> None:
        at = START + minutes * MINUTE
        ship.put({**item(at, temp=str(minutes)), "measured": {"S": f"{at:%Y-%m-%dT%H:%M:%SZ}"}})

    put(10)
    ship.now = START + 30 * MINUTE
    ship.run()
    ship.now = START + 75 * MINUTE
    ship.run()
    for minutes, again in ((20, job.LATE), (30, job.RECONCILE)):
        put(minutes)
        assert ship.run().windows == 0
        report = ship.run(again)
        assert (report.windows, report.late_rows) == (1, 1)
        assert f"T12:{minutes}:00Z" in ship.text(HOUR_12)


def test_of_many_files_of_a_name_over_several_pages_of_the_list_the_oldest_is_kept(ship: Shipping) -> None:
    ship.drive.state.page_files = 2
    for number in (1, 2, 3, 4, 5):
        of = {"id": f"x{number}", "name": HOUR_12, "parent": ship.drive.folder_id, "mime_type": "text/csv"}
        ship.drive.state.files.add({**of, "drive_id": ship.drive.state.shared_drive}, b"datetime_utc,temp\r\n")
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    assert [file.file_id for file in ship.drive.named(HOUR_12)] == ["x1"]


def test_a_list_that_drive_calls_incomplete_is_no_reason_for_a_second_file(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    before = ship.files
    ship.put_rows(START, 8)
    ship.drive.state.incomplete_lists = 100
    with pytest.raises(Transient):
        ship.run()
    assert ship.files == before
    ship.drive.state.incomplete_lists = 0
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 9


def test_a_file_that_a_person_deleted_comes_back(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    before = ship.text(HOUR_12)
    for remove in ("trash", "delete"):
        held = ship.drive.named(HOUR_12)[0].file_id
        if remove == "trash":
            ship.drive.state.files.change(held, trashed=True)
        else:
            ship.drive.state.files.delete(held)
        assert ship.run().windows == 1
        assert ship.text(HOUR_12) == before


def test_a_file_that_a_person_moved_or_renamed_is_found_by_its_id(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    held = ship.drive.named(HOUR_12)[0]
    ship.drive.state.files.change(held.file_id, parent=ship.drive.state.shared_drive, name="kept.csv")
    ship.put(item(START + 4 * MINUTE, temp="9"))
    ship.run()
    assert list(ship.files) == ["kept.csv"]
    assert "T12:04:00Z,9" in ship.text("kept.csv")


def test_a_file_that_a_person_edited_is_made_right_again(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    before = ship.text(HOUR_12)
    ship.drive.state.files.change(ship.drive.named(HOUR_12)[0].file_id, content=b"datetime_utc,temp\r\n")
    ship.run()
    assert ship.text(HOUR_12) == before


@pytest.mark.parametrize("coding", ["utf-16", "latin-1"])
def test_a_file_that_a_person_made_unreadable_is_made_anew_with_a_warning(
    ship: Shipping, caplog: pytest.LogCaptureFixture, coding: str
) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    before = ship.text(HOUR_12)
    broken = ("datetime_utc,°C\r\n" + "2026-02-07T12:30:00Z,1\r\n" * 9).encode(coding)
    ship.drive.state.files.change(ship.drive.named(HOUR_12)[0].file_id, content=broken)
    with caplog.at_level(logging.WARNING):
        ship.run()
    assert ship.text(HOUR_12) == before
    assert "is not a CSV file of ours" in caplog.text


def test_a_file_in_the_directory_that_a_person_made_unreadable_is_named_and_left(ship: Shipping) -> None:
    ship.extra = dict.fromkeys(google_variables(), "")
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    path = ship.folder / "drive" / HOUR_12
    path.write_bytes(b"datetime_utc,\xb0C\r\n")
    with pytest.raises(Permanent) as refused:
        ship.run()
    assert HOUR_12 in refused.value.message
    assert "move it away" in refused.value.hint
    path.unlink()
    ship.run()
    assert len(path.read_text().splitlines()) == 6


def test_a_row_that_a_person_added_with_a_spreadsheet_stays_under_its_columns(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    saved = f"\ufeff{ship.text(HOUR_12)}2026-02-07T12:30:00Z,99\r\n".encode()
    ship.drive.state.files.change(ship.drive.named(HOUR_12)[0].file_id, content=saved)
    ship.run()
    assert ship.files[HOUR_12] == saved.removeprefix(b"\xef\xbb\xbf")


def test_of_two_files_of_a_name_the_oldest_is_updated_and_the_other_trashed(
    ship: Shipping, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2):
        of = {"id": f"x{number}", "name": HOUR_12, "parent": ship.drive.folder_id, "mime_type": "text/csv"}
        ship.drive.state.files.add({**of, "drive_id": ship.drive.state.shared_drive}, b"datetime_utc,temp\r\n")
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    with caplog.at_level(logging.WARNING):
        ship.run()
    assert [file.file_id for file in ship.drive.named(HOUR_12)] == ["x1"]
    assert "more than once" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        *(f"application/vnd.google-apps.{kind}" for kind in ("spreadsheet", "folder", "shortcut", "drive-sdk.7")),
        "application/pdf",
        "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ],
)
@pytest.mark.parametrize("is_older", [True, False], ids=["older", "newer"])
def test_what_is_no_file_but_has_its_name_is_left_alone_and_told_once(
    ship: Shipping,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    is_older: bool,  # noqa: FBT001
) -> None:
    of = {"id": "theirs", "name": HOUR_12, "parent": ship.drive.folder_id, "drive_id": ship.drive.state.shared_drive}

    def put_theirs() -> None:
        ship.drive.state.files.add({**of, "mime_type": kind})

    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    if is_older:
        put_theirs()
    ship.run()
    if not is_older:
        put_theirs()
    theirs = ship.drive.state.files.held["theirs"]
    ship.put_rows(START, 8)
    with caplog.at_level(logging.WARNING):
        ship.run()
        ship.run(job.LATE)
        ship.backfill(START - timedelta(hours=1), START + timedelta(hours=1))
        with closing(ship.export()) as export:
            export.chart.cells(export.chart.partitions()[0], Window(START, START + timedelta(hours=1)))
    assert ship.drive.state.files.held["theirs"] == theirs
    (ours,) = (file for file in ship.drive.named(HOUR_12) if file.file_id != "theirs")
    assert len(ours.content.splitlines()) == 9
    told = kind.replace("application/vnd.google-apps.", "a Google ")
    assert caplog.text.count(f"{told} has the same name") == 1


def test_a_csv_that_a_person_uploaded_from_windows_is_the_file_of_its_hour(ship: Shipping) -> None:
    of = {"id": "x1", "name": HOUR_12, "parent": ship.drive.folder_id, "drive_id": ship.drive.state.shared_drive}
    ship.drive.state.files.add({**of, "mime_type": "application/vnd.ms-excel"}, b"datetime_utc,temp\r\n")
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    assert [file.file_id for file in ship.drive.named(HOUR_12)] == ["x1"]


def test_a_shortcut_in_the_place_of_the_folder_is_one_clear_line(ship: Shipping) -> None:
    shortcut = {"id": "sc", "name": "sc", "parent": ship.drive.folder_id, "drive_id": ship.drive.state.shared_drive}
    ship.drive.state.files.add({**shortcut, "mime_type": "application/vnd.google-apps.shortcut"})
    ship.extra["GOOGLE_DRIVE_FOLDER_ID"] = "sc"
    with pytest.raises(Permanent, match="is a shortcut"):
        ship.run()


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("hours", [0, 2, 4])
def test_an_hour_whose_file_cannot_be_written_keeps_no_other_hour_waiting(ship: Shipping, hours: int) -> None:
    ship.extra = {**dict.fromkeys(google_variables(), ""), "DRIVE_CATCHUP_HOURS": "4"}
    for number in range(5):
        ship.put_rows(START + number * HOUR, 3)
    bad = ship.folder / "drive" / f"locness_data_20260207_{12 + hours}.csv"
    bad.mkdir(parents=True)
    ship.now = START + 4 * HOUR + 30 * MINUTE
    report = ship.run()
    assert [failure.message for failure in report.failures] == [f"{bad}: is a directory"]
    assert (report.rows, report.ledger.closes) == (12, True)
    ship.put_rows(START + 4 * HOUR + 5 * MINUTE, 3)
    bad.rmdir()
    assert ship.run().rows == (6 if hours == 4 else 9)
    ship.now += HOUR
    ship.run()
    assert sum(path.read_bytes().count(b"\n") - 1 for path in bad.parent.iterdir()) == 18


@pytest.mark.parametrize(
    ("make", "what"),
    [(Path.mkdir, "a directory"), (os.mkfifo, "not a regular file"), (dangling, "not a regular file")],
)
def test_what_is_no_file_but_has_its_name_in_the_directory_is_named(
    ship: Shipping, make: Callable[[Path], None], what: str
) -> None:
    ship.extra = dict.fromkeys(google_variables(), "")
    (ship.folder / "drive").mkdir()
    make(ship.folder / "drive" / HOUR_12)
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    with pytest.raises(Permanent) as refused:
        ship.run()
    assert (refused.value.message, refused.value.hint[:12]) == (
        f"{ship.folder / 'drive' / HOUR_12}: is {what}",
        "move it away",
    )


def test_each_file_that_is_uploaded_or_written_is_told_with_its_rows_and_bytes(
    ship: Shipping, caplog: pytest.LogCaptureFixture
) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    with caplog.at_level(logging.INFO):
        ship.run()
        ship.run()
        ship.extra = dict.fromkeys(google_variables(), "")
        ship.run()
    size_bytes = len(ship.files[HOUR_12])
    assert caplog.text.count(f"{HOUR_12}: uploaded, 5 rows, {size_bytes} bytes") == 1
    assert caplog.text.count(f"{HOUR_12}: written, 5 rows, {size_bytes} bytes") == 1


def test_rows_that_the_table_dropped_stay_in_the_file_unless_that_is_allowed(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    before = ship.text(HOUR_12)
    table = ship.dynamo._tables["underway"]  # noqa: SLF001 - time to live has no call of its own
    del table.items[next(iter(table.items))]
    ship.run()
    assert ship.text(HOUR_12) == before
    ship.extra["DRIVE_ALLOW_SHRINK"] = "true"
    report = ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 5
    assert f"{HOUR_12}: 1 row that the source no longer has was removed: 2026-02-07T12:00:00Z" in report.notes
    assert report.removed_rows == 1


def test_a_stale_list_makes_no_second_file(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    ship.restart()
    ship.drive.state.stale_lists = 5
    ship.put_rows(START, 8)
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 9


@pytest.mark.parametrize("fault", [DriveFault(cut=True, after=True), DriveFault(after=True)], ids=repr)
def test_a_file_whose_upload_drive_did_not_answer_is_found_by_its_id_and_not_made_again(
    ship: Shipping, fault: DriveFault
) -> None:
    ship.now = START + 5 * MINUTE
    for rows, upload in ((5, "POST /upload"), (8, "PATCH /upload")):
        ship.put_rows(START, rows)
        ship.drive.add_fault(fault, upload)
        report = ship.run()
        assert (report.ledger.total.new, report.windows) == (5 if rows == 5 else 3, 1)
        assert len(ship.text(HOUR_12).splitlines()) == rows + 1
        assert not any(file.trashed for file in ship.drive.state.files.held.values())
    ship.restart()
    assert ship.run().windows == 0
    assert ship.asked("generateIds") == 1


def test_a_process_that_ended_before_drive_answered_is_followed_by_one_that_finds_the_file(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.drive.add_fault(DriveFault(after=True), "/upload", times=100)
    with pytest.raises(Transient):
        ship.run()
    ship.restart()
    ship.drive.state.waiting.clear()
    ship.drive.state.stale_lists = 1
    ship.put_rows(START, 6)
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 7
    assert len(ship.drive.named(HOUR_12)) == 1
    assert ship.asked("generateIds") == 1


def test_after_an_outage_the_hours_in_between_are_made_up_for_within_the_bound(
    ship: Shipping, caplog: pytest.LogCaptureFixture
) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    for hours in range(1, 6):
        ship.put_rows(START + timedelta(hours=hours), 3)
    ship.now = START + timedelta(hours=5, minutes=5)
    ship.run()
    assert sorted(name[-6:-4] for name in ship.files) == ["12", "15", "16", "17"]
    assert "backfill dynamo_to_drive --from 2026-02-07T11:00:00+00:00 --to 2026-02-07T15:00:00+00:00" in caplog.text
    ship.backfill(START, START + timedelta(hours=3))
    assert sorted(name[-6:-4] for name in ship.files) == ["12", "13", "14", "15", "16", "17"]


def test_a_dry_run_says_files_rows_and_bytes_and_changes_nothing(
    ship: Shipping, caplog: pytest.LogCaptureFixture
) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    with caplog.at_level(logging.INFO):
        report = ship.run(dry_run=True)
    assert (report.rows, report.windows) == (5, 1)
    assert f"{HOUR_12}: would be written, 5 rows, {report.bytes} bytes" in caplog.text
    assert ship.files == {}
    assert ship.checkpoints.cursors(job.NAME) == {}


def test_without_credentials_the_same_files_stand_in_a_directory(ship: Shipping) -> None:
    ship.put_rows(START - 30 * MINUTE, 5)
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.run()
    ship.extra = dict.fromkeys(google_variables(), "")
    ship.run()
    folder = ship.folder / "drive"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == ship.files
    assert sorted(ship.files) == [HOUR_11, HOUR_12]
    (folder / HOUR_12).unlink()
    ship.run()
    assert (folder / HOUR_12).read_bytes() == ship.files[HOUR_12]


def test_a_stop_in_mid_run_loses_nothing(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.now = START + 5 * MINUTE
    ship.stop.ask("the process ends")
    with pytest.raises(Stopped):
        ship.run()
    ship.stop = type(ship.stop)()
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 6


def test_formulas_are_data_unless_they_are_to_be_escaped(ship: Shipping) -> None:
    ship.put({**item(START, temp="-1.5"), "note": {"S": "=1+1"}, "who": {"S": "@me"}, "=name": {"S": "'quoted"}})
    ship.now = START + MINUTE
    ship.run()
    assert ship.text(HOUR_12) == "datetime_utc,=name,note,temp,who\r\n2026-02-07T12:00:00Z,'quoted,=1+1,-1.5,@me\r\n"
    ship.extra["CSV_ESCAPE_FORMULAS"] = "true"
    ship.run()
    expected = "datetime_utc,'=name,note,temp,who\r\n2026-02-07T12:00:00Z,''quoted,'=1+1,-1.5,'@me\r\n"
    assert ship.text(HOUR_12) == expected
    assert ship.run().windows == 0


def test_a_hostile_item_survives_as_valid_csv(ship: Shipping) -> None:
    digits = "12345678901234567890123456789012345678"
    ship.put(
        {
            **item(START, huge=digits, tiny="1E-130"),
            'a,"b"\nc\rd': {"S": 'x,"y"\r\nz\r'},
            "binary": {"B": "AAH/"},
            "large": {"S": "x" * 390_000},
            "list": {"L": [{"N": "1.10"}, {"NULL": True}, {"BOOL": False}]},
            "map": {"M": {"b": {"N": digits}, "a": {"S": "é"}}},
            "numbers": {"NS": ["10", "9", "1E+2"]},
            "texts": {"SS": ["b", "a"]},
            "nothing": {"NULL": True},
            "nul": {"S": "a\0b"},
        }
    )
    ship.now = START + MINUTE
    ship.run()
    csv.field_size_limit(1 << 20)
    (row,) = csv.DictReader(io.StringIO(ship.text(HOUR_12), newline=""))
    assert row["huge"] == digits
    assert row["tiny"] == "1E-130"
    assert row['a,"b"\nc\rd'] == 'x,"y"\r\nz\r'
    assert (row["binary"], row["nothing"], row["nul"], len(row["large"])) == ("AAH/", "", "a\0b", 390_000)
    assert row["list"] == "[1.10,null,false]"
    assert row["map"] == f'{{"a":"é","b":{digits}}}'
    assert (row["numbers"], row["texts"]) == ("[9,10,1E+2]", '["a","b"]')


def test_a_folder_on_another_drive_than_said_is_one_clear_line(ship: Shipping) -> None:
    ship.extra["GOOGLE_SHARED_DRIVE_ID"] = "0Aother"
    with pytest.raises(Permanent) as refused:
        ship.run()
    assert refused.value.hint == f"set GOOGLE_SHARED_DRIVE_ID to {ship.drive.state.shared_drive}"
