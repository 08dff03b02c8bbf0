"""What Drive and the network do wrong, against the real client library: one file per name, as if undisturbed."""

import json
import random
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from app.core.errors import Permanent, Transient
from app.core.retry import RetryPolicy
from app.core.runs import Stop
from app.dynamo_to_drive import job
from app.dynamo_to_drive.drive import Drive
from effort import EFFORT
from shipping import START, Shipping, item, shipping
from simulators.drive import DriveFault

pytestmark = pytest.mark.slow

HOUR_12 = "locness_data_20260207_12.csv"
UPLOAD = "^(POST|PATCH|PUT) /upload"
FAULTS = (
    DriveFault(),
    DriveFault(after=True),
    DriveFault(cut=True),
    DriveFault(cut=True, after=True),
    DriveFault(502, html=True, after=True),
    DriveFault(403, "userRateLimitExceeded"),
    DriveFault(429, "RATE_LIMIT_EXCEEDED", newer_style=True),
    DriveFault(403, "RATE_LIMIT_EXCEEDED", newer_style=True, after=True),
    DriveFault(401, "authError"),
)
TIMEOUT_SECONDS = 0.4
UPLOADS = 350 * EFFORT
TIME_OUTS = tuple(DriveFault(cut=True, after=after, stall_seconds=1.5 * TIMEOUT_SECONDS) for after in (False, True))


@pytest.fixture
def ship(tmp_path: Path) -> Iterator[Shipping]:
    with shipping(tmp_path) as made:
        made.now = START + timedelta(minutes=5)
        yield made


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize("where", [UPLOAD, "GET .*generateIds", "GET /drive/v3/files$"])
def test_one_fault_anywhere_leaves_one_right_file_in_the_same_run(
    ship: Shipping, fault: DriveFault, where: str
) -> None:
    ship.put_rows(START, 5)
    ship.drive.add_fault(fault, where)
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 6
    ship.put_rows(START, 8)
    ship.drive.add_fault(fault, where)
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 9


@pytest.mark.parametrize("fault", FAULTS[::3], ids=repr)
def test_one_fault_of_the_sign_in_leaves_one_right_file_in_the_same_run(ship: Shipping, fault: DriveFault) -> None:
    ship.put_rows(START, 5)
    ship.drive.add_fault(fault, "POST /token")
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 6


def test_a_drive_that_stays_broken_fails_the_run_and_the_next_one_recovers(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.drive.add_fault(DriveFault(after=True), UPLOAD, times=100)
    with pytest.raises(Transient):
        ship.run()
    partition = next(iter(ship.checkpoints.errors))
    assert "500" in ship.checkpoints.errors[partition]
    cursor = ship.checkpoints.cursors(job.NAME)
    ship.drive.state.waiting.clear()
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 6
    assert ship.checkpoints.cursors(job.NAME) == cursor
    assert ship.checkpoints.errors == {}


def test_tokens_that_run_out_between_calls_are_renewed(ship: Shipping) -> None:
    with closing(ship.export()) as export:
        for number in range(1, 4):
            ship.put_rows(START, number)
            ship.drive.state.tokens.expire()
            export.jobs[0].work(ship.context())
            assert len(ship.text(HOUR_12).splitlines()) == number + 1
    assert ship.drive.state.tokens.issued >= 3


@pytest.mark.parametrize("time_out", TIME_OUTS, ids=repr)
@pytest.mark.parametrize("where", [UPLOAD, "GET .*generateIds", "GET /drive/v3/files$", "POST /token"])
def test_a_call_that_times_out_is_asked_again_and_its_late_answer_is_taken_for_nothing(
    ship: Shipping, time_out: DriveFault, where: str
) -> None:
    ship.extra["GOOGLE_DRIVE_TIMEOUT_SECONDS"] = str(TIMEOUT_SECONDS)
    ship.put_rows(START, 5)
    ship.drive.add_fault(time_out, where)
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 6


def test_the_answer_that_came_too_late_is_not_taken_for_that_of_the_next_call(ship: Shipping) -> None:
    for hours in range(2):
        ship.put_rows(START + timedelta(hours=hours), 5)
    ship.now = START + timedelta(hours=1, minutes=5)
    ship.run()
    ship.extra["GOOGLE_DRIVE_TIMEOUT_SECONDS"] = str(TIMEOUT_SECONDS)
    service = ship.export().drive
    assert service is not None
    drive = Drive(service, RetryPolicy(attempts=1), Stop())
    held = [drive.get(ship.drive.named(name)[0].file_id) for name in sorted(ship.files)]
    assert held[0] is not None
    assert held[1] is not None
    ship.drive.add_fault(DriveFault(200, html=True, stall_seconds=1.5 * TIMEOUT_SECONDS))
    with pytest.raises(Transient):
        drive.get(held[0].id)
    assert drive.get(held[1].id) == held[1]
    service.forget()


def test_what_is_no_json_is_asked_again(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.drive.add_fault(DriveFault(200, html=True), "GET /drive/v3/files")
    ship.drive.add_fault(DriveFault(200, html=True), UPLOAD)
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 6


def large(ship: Shipping) -> bytes:
    """An hour of more than 5 MB; its file as an undisturbed run makes it."""
    for minute in range(16):
        ship.put({**item(START + timedelta(seconds=minute)), "note": {"S": "x" * 380_000}})
    lines = [f"2026-02-07T12:00:{minute:02d}Z,{'x' * 380_000}" for minute in range(16)]
    return ("\r\n".join(["datetime_utc,note", *lines]) + "\r\n").encode()


def test_a_large_file_goes_up_in_pieces(ship: Shipping) -> None:
    expected = large(ship)
    ship.run()
    assert ship.files == {HOUR_12: expected}
    assert ship.asked("PUT /upload") == 2


@pytest.mark.parametrize("kind", ["503", "lost", "lost last", "kept a part", "session lost", "opening lost"])
def test_a_large_upload_goes_on_where_drive_has_it(ship: Shipping, kind: str) -> None:
    expected = large(ship)
    if kind == "503":
        ship.drive.add_fault(DriveFault(503), "PUT", times=3)
    elif kind in ("lost", "lost last"):
        ship.drive.add_fault(DriveFault(cut=True, after=True), "PUT", times=1 if kind == "lost" else 3)
    elif kind == "kept a part":
        ship.drive.state.uploads.keep_bytes = 262_144
    elif kind == "session lost":
        ship.drive.add_fault(DriveFault(404, "notFound", after=True), "PUT")
    else:
        ship.drive.add_fault(DriveFault(cut=True, after=True), "POST /upload")
    ship.run()
    assert ship.files == {HOUR_12: expected}


def test_a_download_that_breaks_off_does_not_shrink_the_file(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.run()
    held = ship.drive.named(HOUR_12)[0]
    ship.drive.state.files.change(held.file_id, content=held.content + b"2026-02-07T12:30:00Z,99\r\n")
    ship.drive.add_fault(DriveFault(cut=True), f"GET .*{held.file_id}", times=2)
    ship.run()
    assert "T12:30:00Z,99" in ship.text(HOUR_12)
    assert len(ship.text(HOUR_12).splitlines()) == 7


def test_each_refusal_is_one_line_with_the_next_step_and_the_next_run_recovers(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    state = ship.drive.state
    for name, hint in (("revoked", "Content manager"), ("full", "share a Shared Drive")):
        setattr(state, name, True)
        with pytest.raises(Permanent) as refused:
            ship.run()
        assert hint in refused.value.hint
        assert "\n" not in str(refused.value)
        setattr(state, name, False)
    state.tokens.revoked = True
    with pytest.raises(Permanent) as refused:
        ship.run()
    assert "invalid_grant" in refused.value.message
    state.tokens.revoked = False
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 6


def test_a_service_account_in_my_drive_is_told_to_use_a_shared_drive(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.extra |= {"GOOGLE_DRIVE_FOLDER_ID": "root", "GOOGLE_SHARED_DRIVE_ID": ""}
    with pytest.raises(Permanent) as refused:
        ship.run()
    assert "service accounts have no storage of their own: share a Shared Drive" in refused.value.hint


def test_a_user_may_write_to_my_drive(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.extra |= {"GOOGLE_DRIVE_FOLDER_ID": "", "GOOGLE_SHARED_DRIVE_ID": ""}
    ship.token = ship.drive.state.tokens.user(ship.drive.url)
    ship.run()
    assert len(ship.text(HOUR_12).splitlines()) == 6


def test_client_secrets_without_consent_say_how_to_get_it(ship: Shipping) -> None:
    ship.token = ship.drive.state.tokens.installed(ship.drive.url)
    with pytest.raises(Permanent) as refused:
        ship.run()
    assert "python -m app google" in refused.value.hint


@pytest.mark.parametrize("text", ["{}", "[]", '{"type":"service_account"}', '{"installed":{}}'])
def test_credentials_of_no_known_shape_are_one_clear_line(ship: Shipping, text: str) -> None:
    path = ship.folder / "key.json"
    path.write_text(text)
    ship.extra |= {"GOOGLE_CREDENTIALS_JSON": "", "GOOGLE_CREDENTIALS_FILE": str(path)}
    with pytest.raises(Permanent) as refused:
        ship.run()
    assert "service account" in refused.value.hint


def test_a_kept_token_of_an_installed_app_is_used_and_renewed_in_place(ship: Shipping) -> None:
    ship.put_rows(START, 5)
    ship.token = ship.drive.state.tokens.installed(ship.drive.url)
    kept = ship.folder / "google_token.json"
    kept.write_text(json.dumps(ship.drive.state.tokens.user(ship.drive.url)))
    kept.chmod(0o600)
    ship.run()
    assert json.loads(kept.read_text())["token"].startswith("ya29.")
    assert kept.stat().st_mode & 0o777 == 0o600
    assert len(ship.text(HOUR_12).splitlines()) == 6


@pytest.mark.timeout(300)
def test_many_uploads_under_faults_leave_one_file_per_hour_equal_to_undisturbed_ones(tmp_path: Path) -> None:
    """Each upload suffers every third time, and each other call now and then; five uploads an hour."""
    draw = random.Random(7)  # noqa: S311 - a fixed course of events
    with shipping(tmp_path / "a") as ship, shipping(tmp_path / "b") as quiet:
        ship.extra["GOOGLE_DRIVE_TIMEOUT_SECONDS"] = str(TIMEOUT_SECONDS)
        quiet.extra["DRIVE_CATCHUP_HOURS"] = "250"
        uploads = failed = rows = 0
        export = ship.export()
        while uploads < UPLOADS:
            at, rows = START + timedelta(minutes=12 * rows), rows + 1
            for world in (ship, quiet):
                world.put(item(at, temp=str(rows)))
                world.now = at + timedelta(seconds=1)
            for where in drawn_places(draw):
                ship.drive.add_fault(draw.choice(TIME_OUTS if draw.randrange(25) == 0 else FAULTS), where)
            if draw.randrange(10) == 0:
                ship.drive.state.tokens.expire()
            try:
                uploads += export.jobs[0].work(ship.context()).windows
            except (Transient, Permanent):
                assert ship.checkpoints.errors
                failed += 1
            if rows % 100 == 0:  # a new process, which knows nothing but the checkpoints
                export.close()
                export = ship.export()
        export.close()
        assert ship.drive.state.faults_taken > 0.4 * UPLOADS
        assert ship.drive.state.tokens.issued > UPLOADS // 20
        assert failed < UPLOADS // 10
        ship.drive.state.waiting.clear()
        ship.run()
        while quiet.run().more:
            pass
        assert ship.files == quiet.files
        assert (len(ship.files), ship.asked("PATCH /upload") > 0.7 * UPLOADS) == ((rows + 4) // 5, True)
        assert sum(content.count(b"\n") - 1 for content in ship.files.values()) == rows
        assert ship.drive.state.files.held.keys() == {*ship.drive.state.files.used}  # none was deleted
        assert not any(file.trashed for file in ship.drive.state.files.held.values())  # nor made twice and put aside


def drawn_places(draw: random.Random) -> Iterator[str]:
    """Where the faults of one run strike."""
    if draw.randrange(3) == 0:
        yield UPLOAD
    if draw.randrange(8) == 0:
        yield draw.choice(["GET /drive/v3/files$", "GET .*generateIds", "GET /drive/v3/files/", "POST /token"])
