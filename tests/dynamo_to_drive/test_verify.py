"""Proof of delivery of the hourly files, on Drive and in a folder: what was done to files is named and mended."""

from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from app.core.runs import Stop
from app.core.verify import CellState, Verdict, heal, verify
from app.core.windows import Window
from app.dynamo_to_drive.job import HourFileExport
from shipping import START, TABLE, Shipping, shipping

HOUR = timedelta(hours=1)
SPAN = Window(START, START + 6 * HOUR)
NAMES = [f"locness_data_20260207_{hour}.csv" for hour in (12, 13, 14, 15)]


class World:
    """A shipping of four whole hours, and a way to do things to its files."""

    def __init__(self, at: Shipping, *, on_drive: bool) -> None:
        self.at = at
        self.on_drive = on_drive

    @property
    def files(self) -> dict[str, bytes]:
        if self.on_drive:
            return self.at.files
        return {path.name: path.read_bytes() for path in (self.at.folder / "drive").glob("*.csv")}

    def put(self, name: str, content: bytes | None) -> None:
        """Replace a file as a person would, or delete it."""
        if not self.on_drive:
            path = self.at.folder / "drive" / name
            path.unlink() if content is None else path.write_bytes(content)
            return
        files = self.at.drive.state.files
        (found,) = files.matching(lambda file: file.name == name and not file.trashed)
        files.change(found.file_id, **({"trashed": True} if content is None else {"content": content}))

    def signs(self, export: HourFileExport) -> dict[str, str]:
        found = verify(export.verification(Stop()), SPAN, Stop())
        return {f"{each.slot.window.start:%H}": each.sign.value for each in found}


@pytest.fixture(params=["drive", "folder"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with shipping(tmp_path) as at:
        if request.param == "folder":
            at.extra = dict.fromkeys(
                ("GOOGLE_CREDENTIALS_JSON", "GOOGLE_DRIVE_API_URL", "GOOGLE_DRIVE_FOLDER_ID", "GOOGLE_SHARED_DRIVE_ID"),
                "",
            )
        at.extra["DRIVE_CATCHUP_HOURS"] = "6"
        at.put_rows(START, 240, every_seconds=60)
        at.now = START + 5 * HOUR + timedelta(minutes=20)
        at.run()
        yield World(at, on_drive=request.param == "drive")


def mended(world: World, export: HourFileExport) -> tuple[list[str], int]:
    """The hours that were mended, and how many could not be."""
    told: list[str] = []
    context = world.at.context()
    report = heal(
        export.verification(context.stop),
        SPAN,
        context,
        lambda verdict: told.append(f"{verdict.slot.window.start:%H}") if verdict.healed else None,
    )
    return told, len(report.failures)


def test_what_is_deleted_cut_or_exchanged_is_named_and_mended(world: World) -> None:
    before = world.files
    assert sorted(before) == NAMES
    with closing(world.at.export()) as export:
        assert world.signs(export) == {"12": "=", "13": "=", "14": "=", "15": "=", "16": "="}
        world.put(NAMES[0], None)
        world.put(NAMES[1], before[NAMES[1]][:200])
        world.put(NAMES[3], before[NAMES[2]] + before[NAMES[1]])
        expected = {"12": "-", "13": "*", "14": "=", "15": "*", "16": "="}
        assert world.signs(export) == expected
        assert sorted(world.files) == NAMES[1:]
        chart = export.chart
        states = {f"{cell.window.start:%H}": cell.state for cell in chart.cells(chart.partitions()[0], SPAN)}
        assert states == {
            "12": CellState.MISSING,
            "13": CellState.STALE,
            "14": CellState.EQUAL,
            "15": CellState.STALE,
            "16": CellState.EMPTY,
            "17": CellState.OPEN,
        }
        assert mended(world, export) == (["12", "13", "15"], 0)
        assert set(world.signs(export).values()) == {"="}
        assert world.files == before
        assert mended(world, export) == ([], 0)


def test_a_file_of_other_bytes_is_an_error_and_is_mended(world: World) -> None:
    before = world.files
    with closing(world.at.export()) as export:
        world.put(NAMES[2], b"\xff\xfe\x00")
        assert world.signs(export)["14"] == Verdict.ERROR.value
        assert mended(world, export) == (["14"], 0)
        assert world.files == before


def test_rows_that_the_table_dropped_stay_in_the_file_and_differ(world: World) -> None:
    world.at.dynamo._tables[TABLE].items.clear()  # noqa: SLF001 - the simulator deletes nothing by itself
    before = world.files
    with closing(world.at.export()) as export:
        assert world.signs(export) == {"12": "+", "13": "+", "14": "+", "15": "+", "16": "="}
        assert mended(world, export) == ([], 4)
        world.put(NAMES[0], b"x\r\n1\r\n")
        assert mended(world, export) == ([], 4)
        assert world.files == {**before, NAMES[0]: b"x\r\n1\r\n"}
