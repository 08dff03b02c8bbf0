"""Logs: one line a record, the run it belongs to, and no secret in any of it."""

import io
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import BadSettings
from app.core.runs import named_in_logs
from app.ops.logs import JsonLines, LogLimits, Redaction, configure, release

log = logging.getLogger("app.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    levels = {name: logging.getLogger(name).level for name in ("", "botocore", "urllib3", "httpx")}
    configure("DEBUG", "auto", None, secrets=("canary-secret", "p@ss/word", "hush"), stream=stream)
    yield stream
    release()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def fail(message: str) -> None:
    """Log an exception as a run does."""

    def deeper() -> None:
        raise RuntimeError(message)

    try:
        deeper()
    except RuntimeError:
        log.exception("failed")


def last(stream: io.StringIO) -> dict[str, Any]:
    return lines(stream)[-1]


def test_a_record_is_one_json_object_with_its_time_in_utc(out: io.StringIO) -> None:
    log.warning("wrote %d rows", 7, extra={"rows": 7, "key": "a/b", "seconds": 0.5, "ratio": float("nan")})
    line = last(out)
    assert (line["level"], line["message"], line["logger"]) == ("warn", "wrote 7 rows", "app.test")
    assert (line["rows"], line["key"], line["seconds"], line["ratio"]) == (7, "a/b", 0.5, "nan")
    assert line["time"].endswith("Z")
    assert abs(datetime.fromisoformat(line["time"]) - datetime.now(UTC)) < timedelta(seconds=5)
    assert "run_id" not in line


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/St_Johns"])
def test_the_time_of_a_record_is_utc_wherever_clocks_are_changed(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.LogRecord("app", logging.INFO, __file__, 1, "x", (), None)
    with monkeypatch.context() as environment:
        environment.setenv("TZ", zone)
        time.tzset()
        for at in ("2026-02-07T12:00:00.250Z", "2026-07-07T12:00:00.250Z"):
            record.created = datetime.fromisoformat(at).timestamp()
            assert json.loads(JsonLines(Redaction()).format(record))["time"] == at
    time.tzset()


def test_a_traceback_is_one_field_of_the_same_line(out: io.StringIO) -> None:
    fail("bad\nFAKE LINE canary-secret")
    assert len(out.getvalue().splitlines()) == 1
    assert "Traceback" in last(out)["exception"]
    assert "canary" not in out.getvalue()


def test_a_message_cannot_start_a_line_of_its_own(out: io.StringIO) -> None:
    log.info("user %s", 'x\n{"level": "error"}\r\u2028\x1b[31m\x85')
    assert len(out.getvalue().splitlines()) == 1
    assert out.getvalue().isascii()
    assert last(out)["message"] == 'user x\n{"level": "error"}\r\u2028\x1b[31m\x85'


def test_a_lone_surrogate_does_not_stop_the_log() -> None:
    record = logging.LogRecord("app", logging.INFO, __file__, 1, "\ud800", (), None)
    line = JsonLines(Redaction()).format(record)
    assert line.isascii()
    assert json.loads(line)["message"] == "\ud800"


def test_arguments_that_do_not_fit_are_not_shown() -> None:
    record = logging.LogRecord("app", logging.INFO, __file__, 1, "%d rows", ("canary-argument",), None)
    line = json.loads(JsonLines(Redaction()).format(record))
    assert line["message"] == "%d rows (its arguments do not fit)"
    assert "canary" not in str(line)


def test_the_run_is_in_each_record_of_its_context(out: io.StringIO) -> None:
    with named_in_logs("r1", "influx_to_s3"):
        log.info("inside")
    log.info("outside")
    inside, outside = lines(out)
    assert (inside["run_id"], inside["job"]) == ("r1", "influx_to_s3")
    assert "run_id" not in outside


def test_a_thread_says_the_run_only_when_it_was_carried(out: io.StringIO) -> None:
    with named_in_logs("r1", "job"), ThreadPoolExecutor(4) as pool:
        meeting = threading.Barrier(4)

        def work(number: int) -> int:
            meeting.wait(5)
            log.info("carried %d", number)
            return number

        carried = [pool.submit(copy_context().run, work, number) for number in range(4)]
        assert [each.result() for each in carried] == [0, 1, 2, 3]
        pool.submit(log.info, "bare").result()
    assert [line.get("run_id") for line in lines(out)] == ["r1"] * 4 + [None]


@pytest.mark.parametrize(
    "text",
    [
        "canary-secret",
        "p@ss/word",
        "postgresql://u:p%40ss%2Fword@h/n",
        "password hush!",
        "AKIACANARYCANARY1234"[:20],
        "Authorization: Bearer canary.x.y",
        "{'Authorization': 'Token canary'}",
        "Authorization: Basic Y2FuYXJ5OmNhbmFyeQ==",
        "sent Token canary_0123456789",
        "http://canary:canary@host:8086/x",
        "https://b/k?X-Amz-Credential=canary%2F2026&X-Amz-Signature=canary&x=1",
        "?X-Amz-Security-Token=canary",
        "host=h password=canary dbname=n",
        '{"secret_key": "canary value", "n": 1}',
        "{'api_key': 'canary value'}",
        "hw_ci_" + "canary_" + "A" * 36,
        "-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----",
    ],
)
def test_nothing_that_is_or_looks_like_a_secret_is_written(out: io.StringIO, text: str) -> None:
    log.info("got %s", text, extra={"where": text, "deep": {"list": [text]}})
    fail(text)
    written = out.getvalue()
    assert "***" in written
    assert not any(word in written for word in ("canary", "CANARY", "hush", "Y2Fu", "p@ss", "p%40ss"))


@pytest.mark.parametrize(
    "text",
    [
        "token expired",
        "invalid token: expired",
        "INFLUXDB_TOKEN='': needed because INFLUXDB_URL is set",
        "http://localhost:8086/api",
        "hushed voices",
        "wrote telemetry/device_id=D1/date=2026/02/07/export_120000.parquet",
        "user@example.org",
    ],
)
def test_ordinary_sentences_stay_whole(out: io.StringIO, text: str) -> None:
    log.info(text)
    assert last(out)["message"] == text


@pytest.mark.parametrize("weak", ["qwerty", "Telemetry", "hush", "8086"])
def test_a_secret_that_is_an_ordinary_word_hides_no_other_word_and_does_not_show(weak: str) -> None:
    redact = Redaction((weak,))
    ordinary = f"Headwater on http://127.0.0.1:8086: bucket '{weak}', user {weak}, job {weak}_to_s3, secrets {weak}s"
    assert redact(ordinary) == ordinary
    for text in (f"password={weak} host=h", f"postgresql://u:{weak}@h/n", f"token: '{weak}'", f'"api_key": "{weak}"'):
        assert "***" in redact(text)
        assert weak not in redact(text)


def test_a_secret_of_three_characters_does_not_blank_the_log() -> None:
    assert Redaction(("abc", ""))("abcabc") == "abcabc"


@pytest.mark.parametrize(
    "text", ["token", "a" * 9, "secret", "://", "Bearer ", "-----BEGIN PRIVATE KEY-----", 'token="', "password="]
)
def test_a_hostile_message_of_a_megabyte_is_redacted_in_no_time(text: str) -> None:
    hostile = text * (1_000_000 // len(text))
    started = time.process_time()
    Redaction(("canary-secret",))(hostile)
    assert time.process_time() - started < 3


def test_sdk_debug_logs_stay_off_whatever_the_level(out: io.StringIO) -> None:
    for name in ("botocore.auth", "urllib3.connectionpool", "httpx"):
        logging.getLogger(name).debug("canary")
        logging.getLogger(name).warning("said")
    assert [line["message"] for line in lines(out)] == ["said"] * 3


def test_a_terminal_gets_text_with_marked_tracebacks(out: io.StringIO) -> None:
    del out
    terminal = Terminal()
    configure("INFO", "auto", None, stream=terminal)
    with named_in_logs("r1", "job"):
        log.info("a\nb\u202e", extra={"rows": 7})
    fail("x\n2026-01-01T00:00:00Z ERROR forged")
    first, second, *rest = terminal.getvalue().splitlines()
    assert first.endswith(r"INFO    [job] a\nb\u202e rows=7")
    assert second.endswith("ERROR   failed")
    assert rest
    assert all(line.startswith("    | ") for line in rest)


def test_the_format_can_be_chosen(out: io.StringIO) -> None:
    del out
    terminal, pipe = Terminal(), io.StringIO()
    configure("INFO", "json", None, stream=terminal)
    log.info("x")
    configure("INFO", "text", None, stream=pipe)
    log.info("y")
    assert last(terminal)["message"] == "x"
    assert pipe.getvalue().endswith("INFO    y\n")


def test_the_file_rotates_at_a_megabyte_and_five_are_kept(out: io.StringIO, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "app.log"
    path.parent.mkdir()
    path.write_text("x" * 999_990, encoding="utf-8")
    for number in range(1, 6):
        path.with_name(f"app.log.{number}").write_text(str(number), encoding="utf-8")
    configure("INFO", "auto", path, stream=out)
    log.info("next")
    release()
    assert json.loads(path.read_text(encoding="utf-8"))["message"] == "next"
    assert path.with_name("app.log.1").stat().st_size == 999_990
    assert path.with_name("app.log.5").read_text(encoding="utf-8") == "4"
    assert len(list(path.parent.iterdir())) == 6


def test_a_log_file_that_cannot_be_written_is_a_fault_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BadSettings, match="LOG_FILE="):
        configure("INFO", "auto", tmp_path / "file" / "app.log", stream=io.StringIO())


def test_a_full_disk_costs_the_lines_of_the_log_file_and_is_told_once(
    out: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("INFO", "json", Path("/dev/full"), stream=out)
    for text in ("one", "two"):
        log.info(text)
    release()
    assert [line["message"] for line in lines(out)] == ["one", "two"]
    assert (
        capsys.readouterr().err
        == "/dev/full cannot be written: No space left on device; its lines are lost until it can be\n"
    )


def test_configuring_twice_writes_once_and_leaves_other_handlers_alone(out: io.StringIO) -> None:
    other = logging.NullHandler()
    logging.getLogger().addHandler(other)
    configure("INFO", "json", None, stream=out)
    log.info("once")
    assert len(lines(out)) == 1
    assert other in logging.getLogger().handlers
    logging.getLogger().removeHandler(other)


def test_a_record_below_the_level_is_not_written(out: io.StringIO) -> None:
    configure("WARNING", "json", None, stream=out)
    log.info("no")
    assert out.getvalue() == ""


def recorded(text: str, at: float, *values: object, **more: object) -> logging.LogRecord:
    record = logging.LogRecord("app.test", logging.WARNING, "", 0, text, values, None)
    record.created = at
    record.__dict__.update(more)
    return record


def written(limits: LogLimits, records: Iterable[logging.LogRecord], job: str = "") -> list[str]:
    return [each.getMessage() for record in records for each in limits.passed(record, job)]


def test_of_one_kind_only_so_many_lines_are_written_and_the_others_are_counted() -> None:
    limits = LogLimits()
    first = written(limits, (recorded("bad request %d", 0.0, number) for number in range(10_000)))
    assert len(first) == 20
    assert written(limits, [recorded("another kind", 1.0)]) == ["another kind"]
    assert written(limits, [recorded("a third", 61.0)]) == [
        "9980 more lines were left out, the last: bad request 9999",
        "a third",
    ]
    assert len(written(limits, (recorded("bad request %d", 62.0, number) for number in range(100)))) == 4
    assert [each.getMessage() for each in limits.rest()] == ["96 more lines were left out, the last: bad request 99"]
    assert limits.rest() == []


@pytest.mark.slow
def test_kinds_without_number_are_bounded_together_and_in_memory() -> None:
    limits = LogLimits()
    assert len(written(limits, (recorded(f"made up {number}", 0.0) for number in range(5000)))) == 150
    told = written(limits, [recorded("the end", 0.0)]) + [each.getMessage() for each in limits.rest()]
    assert sum(int(each.split(" more")[0]) for each in told if " more" in each) == 4_851


def test_a_caller_with_a_key_is_heard_beside_a_flood_of_strangers() -> None:
    limits = LogLimits()
    strangers = (recorded("%s by %s", 0.0, number, "nobody", who="nobody", status=401) for number in range(5000))
    written(limits, strangers)
    deleted = [recorded("%s by %s", 0.0, number, "root", who="root", status=200) for number in range(100)]
    assert written(limits, deleted) == [f"{number} by root" for number in range(100)]


def test_a_run_may_name_each_of_many_items() -> None:
    assert len(written(LogLimits(), (recorded("device %d", 0.0, n) for n in range(1000)), "influx_to_s3")) == 1000


def test_what_was_left_out_is_told_when_the_log_is_closed(tmp_path: Path) -> None:
    stream = io.StringIO()
    configure("INFO", "json", tmp_path / "app.log", stream=stream)
    for number in range(50):
        log.warning("flood %d", number)
    release()
    assert lines(stream)[-1]["message"] == "30 more lines were left out, the last: flood 49"
    assert (tmp_path / "app.log").read_text() == stream.getvalue()


def test_a_line_has_a_bounded_length(out: io.StringIO) -> None:
    log.warning("x" * 1_000_000)
    assert len(last(out)["message"]) < 9000
    fail("y" * 1_000_000)
    assert len(last(out)["exception"]) < 7000


def test_the_file_is_for_its_owner_alone_also_an_old_one_and_the_next(tmp_path: Path) -> None:
    path = tmp_path / "app.log"
    path.write_text("x" * 999_990)
    path.chmod(0o644)
    configure("INFO", "json", path, stream=io.StringIO())
    log.warning("a line that makes a new file")
    release()
    assert {each.name: each.stat().st_mode & 0o777 for each in tmp_path.iterdir()} == {
        "app.log": 0o600,
        "app.log.1": 0o600,
    }


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_pipe_that_nobody_reads_does_not_bring_out_what_is_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO", "json", None, secrets=("canary-secret",), stream=Gone())
    try:
        logging.getLogger("app.x").warning("the token is %s", "canary-secret")
    finally:
        release()
    assert capsys.readouterr().err == "a log line of app.x cannot be written: BrokenPipeError\n"
