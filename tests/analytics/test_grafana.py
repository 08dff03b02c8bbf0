"""The Grafana board: each of its requests, as the Infinity data source sends it, gives the columns of its panel."""

import json
import random
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from daemon import Daemon, Daemons
from lake import exported, put_telemetry

BOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "telemetry.json").read_text())
START = datetime(2026, 2, 1, 6, tzinfo=UTC)
SHAPES: Mapping[str, tuple[type, ...]] = {"number": (int, float), "string": (str,), "timestamp": (str,)}


def targets(part: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(part, dict):
        if "url_options" in part:
            yield part
        for value in part.values():
            yield from targets(value)
    elif isinstance(part, list):
        for value in part:
            yield from targets(value)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("grafana")
    for device in ("D1", "D2"):
        content = exported(device, START, 90, draw=random.Random(device))  # noqa: S311 - test data
        put_telemetry(folder, f"device_id={device}/date=2026/02/01/export_060000.parquet", content)
    started = Daemons(folder)
    yield started.start()
    started.close()


@pytest.mark.slow
@pytest.mark.parametrize(("device", "devices"), [("", {"D1", "D2"}), ("D2", {"D2"})])
def test_every_panel_finds_its_columns(served: Daemon, device: str, devices: set[str]) -> None:
    variables = {
        "${device:raw}": device,
        "${minutes}": "15",
        "${__from:date:iso}": "2026-02-01T05:00:00.000Z",
        "${__to:date:iso}": "2026-02-01T07:15:00.000Z",
    }
    found = list(targets(BOARD))
    assert len(found) == 11
    for target in found:
        query = {each["key"]: variables.get(each["value"], each["value"]) for each in target["url_options"]["params"]}
        reply = served.get(f"{target['url']}?{urlencode(query)}")
        assert reply.status == 200, reply.text
        rows = reply.json[target["root_selector"]] if target["root_selector"] else [reply.json]
        assert rows
        named = {row["device_id"] for row in rows if "device_id" in row}
        assert named <= devices or target["url"] == "/analytics/devices"
        for column in target["columns"]:
            values = [row[column["selector"]] for row in rows if row[column["selector"]] is not None]
            assert all(isinstance(value, SHAPES[column["type"]]) for value in values), column
            if column["type"] == "timestamp":
                assert all(datetime.fromisoformat(value).tzinfo for value in values)


def test_the_board_is_whole() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    variables = {each["name"] for each in BOARD["templating"]["list"]}
    assert variables == {"source", "device", "minutes"}
    kinds = {panel["datasource"]["type"] for panel in panels}
    assert kinds == {BOARD["templating"]["list"][0]["query"]} == {"yesoreyeram-infinity-datasource"}
