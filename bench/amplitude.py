"""Converts a week of Amplitude to one NDJSON entry and maps its events to rows: Headwater versus the usual ways.

`uv run python bench/amplitude.py` prints sizes and timings; `--way NAME` runs one way in this process.
"""

import argparse
import gzip
import io
import json
import random
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

from measured import Goal, in_turns, run, table

MONDAY = datetime(2026, 2, 2, tzinfo=UTC)
HOUR = timedelta(hours=1)
HOURS = 168
HERE = Path(__file__)


def event(chance: random.Random, number: int) -> dict[str, Any]:
    """An event with as much in it as those of a real project."""
    from simulators.amplitude import amplitude_event

    words = [f"{chance.getrandbits(40):x}" for _ in range(8)]
    made = amplitude_event("web", MONDAY, number)
    return {**made, "event_properties": {**made["event_properties"], **{f"key_{n}": w for n, w in enumerate(words)}}}


def make(folder: Path, events: int, repeat: int) -> None:
    """The archive of a week. Each hour holds `events` that differ, `repeat` times, with other numbers in them."""
    chance = random.Random(7)
    texts = [json.dumps(event(chance, number)).encode() + b"\n" for number in range(events)]
    (folder / "events.ndjson").write_bytes(b"".join(texts * 20))
    with zipfile.ZipFile(folder / "week.zip", "w", zipfile.ZIP_STORED) as made:
        for hour in range(HOURS):
            at = MONDAY + hour * HOUR
            chance.shuffle(texts)
            content = b"".join(
                text.replace(b'"app": 187520', b'"app": %d' % n) for n in range(repeat) for text in texts
            )
            made.writestr(f"1/1_{at:%Y-%m-%d}_{at.hour}#0.json.gz", gzip.compress(content, 6, mtime=0))


def members(archive: zipfile.ZipFile) -> list[str]:
    """Names in the order of their hours."""
    return sorted(
        archive.namelist(), key=lambda name: [int(n) for n in name[4:-8].replace("-", "_").replace("#", "_").split("_")]
    )


def in_memory(folder: Path) -> int:
    """The ordinary way: everything in memory, then a zip."""
    whole = io.BytesIO((folder / "week.zip").read_bytes())
    with zipfile.ZipFile(whole) as archive:
        text = b"".join(gzip.decompress(archive.read(name)) for name in members(archive))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("2026_week_6.ndjson", text)
    return (folder / "out.zip").write_bytes(out.getvalue())


def streamed(folder: Path) -> int:
    """The standard library, streamed, level 6."""
    with (
        zipfile.ZipFile(folder / "week.zip") as archive,
        zipfile.ZipFile(folder / "out.zip", "w", zipfile.ZIP_DEFLATED) as made,
        made.open("2026_week_6.ndjson", "w", force_zip64=True) as entry,
    ):
        for name in members(archive):
            with archive.open(name) as packed, gzip.open(packed) as text:
                while piece := text.read(1 << 18):
                    entry.write(piece)
    return (folder / "out.zip").stat().st_size


def inflated(folder: Path) -> int:
    """The floor: read and inflate, write nothing."""
    size = 0
    with zipfile.ZipFile(folder / "week.zip") as archive:
        for name in members(archive):
            inflater = zlib.decompressobj(31)
            with archive.open(name) as packed:
                while piece := packed.read(1 << 18):
                    size += len(inflater.decompress(piece))
    return size


def ours(folder: Path) -> int:
    """As the route does it."""
    from app.amplitude.archives import ExportArchive, weeks
    from app.core.windows import Window

    def streams(file: BinaryIO) -> Iterator[tuple[datetime, BinaryIO]]:
        with closing(ExportArchive(Window(MONDAY, MONDAY + HOURS * HOUR), file)) as archive:
            for at, parts in archive.hours.items():
                for stream in archive.streams(parts):
                    yield at, stream

    with (folder / "week.zip").open("rb") as file, (folder / "out.zip").open("wb") as out:
        out.writelines(weeks(streams(cast("BinaryIO", file)), [MONDAY.date()]))
    return (folder / "out.zip").stat().st_size


def json_rows(folder: Path) -> int:
    """Lines to dictionaries by json."""
    with (folder / "events.ndjson").open("rb") as file:
        return len([json.loads(line) for line in file])


def typed_rows(folder: Path) -> int:
    """Lines to what the mapping reads of them, typed."""
    from app.amplitude.events import blocks, reader

    with (folder / "events.ndjson").open("rb") as file:
        decoded = (reader().decoded(block) for block in blocks(file) if isinstance(block, bytes))
        return sum(len(columns["uuid"]) for columns in decoded if columns)


def json_tables(folder: Path) -> int:
    """Rows of seven tables, the ordinary way: json and dictionaries, one event at a time."""
    from amplitude_plain import plain_tables

    with (folder / "events.ndjson").open("rb") as file:
        return sum(len(plain_tables(json.loads(line))) for line in file)


def our_tables(folder: Path) -> int:
    """Rows of seven tables, as the job makes them."""
    from app.amplitude.events import blocks, reader

    def refused(*line: object) -> None:
        raise ValueError(line)

    count = 0
    with (folder / "events.ndjson").open("rb") as file:
        for block in blocks(file):
            count += sum(len(rows.rows) for rows in reader().tables(block, refused).values())
    return count


def nothing(_: Path) -> int:
    """What importing costs."""
    import app.amplitude.archives
    import app.amplitude.events

    return len({app.amplitude.archives, app.amplitude.events, app.amplitude.archives})


WAYS: dict[str, Callable[[Path], int]] = {
    "in memory": in_memory,
    "standard library, streamed": streamed,
    "inflate only": inflated,
    "ours": ours,
    "idle": nothing,
}
ROWS: dict[str, Callable[[Path], int]] = {
    "json": json_rows,
    "ours, typed": typed_rows,
    "json to seven tables": json_tables,
    "ours to seven tables": our_tables,
}


def main() -> None:
    """Compare, or run one way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", default="")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--events", type=int, default=700)
    parser.add_argument("--repeat-events", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.way == "make":
        make(given.folder, given.events, given.repeat_events)
    elif given.way:
        told = {**WAYS, **ROWS}[given.way](given.folder)
        sys.stdout.write(json.dumps({"result": told}) + "\n")
    else:
        with tempfile.TemporaryDirectory() as name:
            sizes = ["--events", str(given.events), "--repeat-events", str(given.repeat_events)]
            run([sys.executable, str(HERE), "--folder", name, *sizes, "--way", "make"])
            compare(Path(name), given.rounds)


def compare(folder: Path, rounds: int) -> None:
    """Run all ways in turns and print the figures beside the goals."""
    command = [sys.executable, str(HERE), "--folder", str(folder), "--way"]
    costs = in_turns({way: (lambda way=way: run([*command, way])) for way in WAYS}, rounds)  # type: ignore[misc]
    size = costs["inflate only"].told["result"]
    packed = (folder / "week.zip").stat().st_size
    print(f"one week: {HOURS} members, {size / 1e6:.0f} MB of NDJSON, {packed / 1e6:.0f} MB zip\n")
    print(table(costs))
    idle = costs["idle"]
    cpu = {way: cost.cpu_seconds for way, cost in costs.items()}
    bytes_of = {way: cost.told["result"] for way, cost in costs.items()}
    print()
    print(
        Goal(
            "CPU of the streamed standard library / ours", cpu["standard library, streamed"] / cpu["ours"], 5, unit="x"
        )
    )
    print(
        Goal(
            "size of ours / of the streamed standard library",
            bytes_of["ours"] / bytes_of["standard library, streamed"],
            1.2,
            at_least=False,
        )
    )
    print(Goal("memory of ours above idle", costs["ours"].peak_mib - idle.peak_mib, 64, at_least=False, unit=" MiB"))
    print(f"CPU of ours / of inflating alone: {cpu['ours'] / cpu['inflate only']:.2f}\n")
    rows = in_turns({way: (lambda way=way: run([*command, way])) for way in ROWS}, rounds)  # type: ignore[misc]
    print(f"{rows['json'].told['result']} events, {(folder / 'events.ndjson').stat().st_size / 1e6:.0f} MB, to rows\n")
    print(table(rows))
    # Only our ways import what the idle one does.
    net = {way: cost.cpu_seconds - idle.cpu_seconds * way.startswith("ours") for way, cost in rows.items()}
    print()
    print(Goal("CPU of json / ours, typed, imports left out", net["json"] / net["ours, typed"], 4, unit="x"))
    ratio = net["json to seven tables"] / net["ours to seven tables"]
    print(f"CPU of the plain way / ours, to rows of seven tables: {ratio:.2f}x")


if __name__ == "__main__":
    main()
