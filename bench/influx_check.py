"""Compare the objects of an export with the generated data, row by row; prints the result as JSON."""

import argparse
import json
from datetime import timedelta
from pathlib import Path

from telemetry import FIELDS, NS, START, WINDOW_SECONDS, Shape, device_name, points, tags_of


def different(shape: Shape, path: Path, device: int, window: int) -> int:
    """How many rows of one object are not as they were generated."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = points(shape, device, window)
    held = pq.read_table(path, partitioning=None)
    if held.num_rows != wanted.num_rows:
        return int(max(held.num_rows, wanted.num_rows))
    times = wanted.column("_time").to_numpy()
    wrong = (
        held.column("timestamp").cast(pa.int64()).to_numpy() * 1000 + held.column("timestamp_nanos").to_numpy() != times
    )
    for name, text in zip(
        ("device_id", "device_type", "location"), (device_name(device), *tags_of(device)), strict=True
    ):
        wrong |= np.array(held.column(name).to_pylist()) != text
    for name in FIELDS:
        one, other = (table.column(name).to_numpy() for table in (held, wanted))
        wrong |= ~((one == other) | (np.isnan(one) & np.isnan(other)))
    wrong |= held.column("hour").to_numpy() != times // (3600 * NS) % 24
    volts, amperes, watts = (wanted.column(name).to_numpy() for name in ("voltage", "current", "power"))
    wrong |= held.column("power_factor").to_numpy() != np.clip(watts / (volts * amperes), 0.0, 1.0)
    return int(np.count_nonzero(wrong))


def main() -> None:
    """Compare all objects."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="")
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("devices", "windows", "rows"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    shape = Shape(given.devices, given.windows, given.rows)
    wrong = objects = 0
    for device in range(shape.devices):
        for window in range(shape.windows):
            start = START + timedelta(seconds=window * WINDOW_SECONDS)
            key = f"device_id={device_name(device)}/date={start:%Y/%m/%d}/export_{start:%H%M%S}.parquet"
            wrong += different(shape, given.folder / "objects" / "telemetry" / key, device, window)
            objects += 1
    surplus = len(list((given.folder / "objects").rglob("*.parquet"))) - objects
    print(json.dumps({"rows": shape.total_rows, "objects": objects, "different": wrong, "surplus_objects": surplus}))


if __name__ == "__main__":
    main()
