"""The client for notebooks against the real daemon: types, time zones, pages and what a person is told."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

import app.frames
from app.core.errors import Rejected, Transient
from app.frames import Headwater
from daemon import Daemon, Daemons, free_port
from lake import exported, parquet, put_telemetry

START = datetime(2026, 2, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("frames")
    for hour in range(2):
        start = START.replace(hour=hour)
        content = exported("D1", start, 30, draw=random.Random(hour))  # noqa: S311 - test data
        put_telemetry(folder, f"device_id=D1/date=2026/02/01/export_{hour:02}0000.parquet", content)
    fine = {
        "timestamp": pa.array([1_770_000_000_000_000] * 2, pa.timestamp("us", "UTC")),
        "timestamp_nanos": pa.array([7, 0], pa.int16()),
    }
    put_telemetry(folder, "fine.parquet", parquet({"device_id": ["D2", "D2"], "on": [True, None], **fine}))
    started = Daemons(folder)
    yield started.start(ANALYTICS_REFRESH_SECONDS="0.2")
    started.close()


def kinds(frame: pd.DataFrame) -> dict[str, str]:
    return {name: str(kind) for name, kind in frame.dtypes.items()}


def test_rows_of_a_device_are_a_frame_with_its_types_and_time_zone(served: Daemon) -> None:
    frame = Headwater(served.url).telemetry("D1", START, "2026-02-01T01:10:00Z")
    assert len(frame) == 40
    assert frame["timestamp"].is_monotonic_increasing
    assert frame["timestamp"].iloc[-1] == pd.Timestamp("2026-02-01T01:09:00Z")
    own = kinds(frame)
    assert [own[name] for name in ("timestamp", "device_id", "voltage", "hour")] == [
        "datetime64[us, UTC]", "str", "float64", "Int64",
    ]  # fmt: skip
    assert "timestamp_nanos" not in frame
    naive = Headwater(served.url).telemetry("D1", datetime(2026, 2, 1, 1), datetime(2026, 2, 2))  # noqa: DTZ001 - as people write it
    assert len(naive) == 30


def test_digits_below_the_microsecond_stay_in_the_timestamp(served: Daemon) -> None:
    frame = Headwater(served.url).telemetry("D2")
    assert [each.value for each in frame["timestamp"]] == [1_770_000_000_000_000_000, 1_770_000_000_000_000_007]
    assert kinds(frame)["on"] == "boolean"
    assert frame["on"].isna().tolist() == [True, False]


def test_a_report_is_a_frame(served: Daemon) -> None:
    frame = Headwater(served.url).report("daily-summary", START, device_id="D1")
    assert (frame["date"].tolist(), frame["row_count"].tolist()) == ([pd.Timestamp("2026-02-01")], [60])
    assert kinds(frame) == {
        "device_id": "str", "date": "datetime64[ms]", "avg_voltage": "float64", "max_temperature": "float64",
        "avg_soc": "float64", "row_count": "Int64",
    }  # fmt: skip
    latest = Headwater(served.url + "/").report("devices/latest")
    assert str(latest["timestamp"].dtype) == "datetime64[us, UTC]"


def test_a_table_is_a_frame_of_all_its_pages(served: Daemon) -> None:
    event = {"platform": "iOS", "event_time": "2026-02-01T00:00:00Z"}
    uuid = "0b1c6a6e-7c1d-4f2a-9d57-00000000000"
    rows = [{"uuid": f"{uuid}{number}", "event_id": number, **event} for number in range(7)]
    assert served.post("/dwh/events-part", {"data": [*rows, {"uuid": f"{uuid}9"}]}).json["count"] == 8
    frame = Headwater(served.url).table("events-part", limit=3, sort_dir="asc", platform="iOS")
    assert frame["event_id"].tolist() == list(range(7))
    own = kinds(Headwater(served.url).table("events-part"))
    assert [own[name] for name in ("event_id", "event_time", "platform")] == ["Int64", "datetime64[us, UTC]", "str"]
    assert kinds(Headwater(served.url).table("events-part", platform="none")) == own


def test_what_the_daemon_refuses_is_told_with_the_next_step(served: Daemon) -> None:
    with pytest.raises(Rejected, match="unknown parameter 'minutes'") as raised:
        Headwater(served.url).report("devices", minutes=1)
    assert "device_id" in raised.value.hint
    with pytest.raises(Transient, match="cannot be reached"):
        Headwater(f"http://127.0.0.1:{free_port()}").report("devices")
    assert "secret" not in repr(Headwater("http://127.0.0.1", "secret"))


def test_the_client_needs_no_package_of_the_daemon(served: Daemon) -> None:
    text = Path(app.frames.__file__).read_text()
    assert [line for line in text.splitlines() if line.startswith("from app")] == [
        "from app.core.errors import AppError, Permanent, Rejected, Transient"
    ]
    assert "pandas" not in Path(f"/proc/{served.process.pid}/maps").read_text(), "the daemon never imports it"
