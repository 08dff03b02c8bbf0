"""DynamoDB to CSV: `python bench/dynamo_to_drive.py [--items 100000] [--rounds 3]`.

Each way runs in a process of its own, in turns; CPU seconds and peak memory are the median over the rounds. The floor
is the bytes over HTTP and the JSON parser without types. Also: read units of Query and Scan.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from dynamo_tables import START

KEYS = {"aws_access_key_id": "b", "aws_secret_access_key": "b", "region_name": "us-east-1"}


def floor(url: str) -> int:
    """The pages as bytes, parsed to dicts by the same parser."""
    from msgspec.json import decode

    rows, key = 0, None
    while True:
        body = json.dumps({"ExclusiveStartKey": key} if key else {}).encode()
        request = urllib.request.Request(url, body, {"X-Amz-Target": "DynamoDB_20120810.Query"})  # noqa: S310 - loopback
        with urllib.request.urlopen(request) as answer:  # noqa: S310 - loopback
            page = decode(answer.read())
        rows += len(page["Items"])
        key = page.get("LastEvaluatedKey")
        if key is None:
            return rows


def ordinary(url: str) -> int:
    """boto3's resource and csv.DictWriter, as people write it."""
    import boto3
    from boto3.dynamodb.conditions import Key

    table = boto3.resource("dynamodb", endpoint_url=url, **KEYS).Table("bench")
    asked: dict[str, Any] = {"KeyConditionExpression": Key("static_partition").eq("data")}
    items: list[dict[str, Any]] = []
    while True:
        page = table.query(**asked)
        items += page["Items"]
        if "LastEvaluatedKey" not in page:
            break
        asked["ExclusiveStartKey"] = page["LastEvaluatedKey"]
    with tempfile.TemporaryFile("w+", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for item in items for name in item}))
        writer.writeheader()
        writer.writerows(items)
    return len(items)


def ours(url: str) -> int:
    """The product's source: the whole file of the hour with its digest."""
    from app.core.ports import UNCOUNTED
    from app.core.runs import Stop
    from app.core.window import Window
    from app.dynamo_to_drive.plan import Wanted
    from app.dynamo_to_drive.source import DynamoSource, Table, Target

    table = Table(Target(Wanted("bench", "datetime_utc", (), 0), "s", "us-east-1", url, "b", "b"))
    source = DynamoSource(table, "bench", Stop())
    hour = source.read("bench", Window(START, START + timedelta(hours=1)), UNCOUNTED, None)
    hour.close()
    return hour.rows


WAYS: dict[str, Callable[[str], int]] = {"floor": floor, "boto3 resource + csv": ordinary, "headwater": ours}


def once(way: str, url: str) -> None:
    """Run a way in this process and print what it took, imports left out."""
    if way != "floor":
        import boto3  # noqa: F401 - loaded before the clock starts
    before = resource.getrusage(resource.RUSAGE_SELF)
    rows = WAYS[way](url)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"rows": rows, "cpu": cpu, "mib": after.ru_maxrss / 1024}))


def read_units() -> None:
    """Six new rows among 20,000: what Query and Scan read."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from shipping import shipping

    with tempfile.TemporaryDirectory() as folder:
        for name, extra in (("query", {}), ("scan", {"DYNAMODB_TIMESTAMP_ATTRIBUTE": "measured"})):
            with shipping(Path(folder)) as ship:
                for number in range(20_000):
                    at = START - timedelta(hours=1, seconds=2 * number)
                    text = {"S": f"{at:%Y-%m-%dT%H:%M:%SZ}"}
                    ship.put({"static_partition": {"S": "data"}, "datetime_utc": text, "measured": text})
                for number in range(6):
                    text = {"S": f"{START + timedelta(seconds=number):%Y-%m-%dT%H:%M:%SZ}"}
                    ship.put({"static_partition": {"S": "data"}, "datetime_utc": text, "measured": text})
                ship.now = START + timedelta(minutes=30)
                ship.extra = {**extra, "DRIVE_CATCHUP_HOURS": "0"}
                ship.run()
                print(f"read units of one run, 6 new rows among 20,000: {name} {ship.dynamo.read_units:g}")


def main() -> None:
    """Serve the pages, run the ways in turns, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way")
    parser.add_argument("--url")
    given = parser.parse_args()
    if given.way:
        once(given.way, given.url)
        return
    here = Path(__file__)
    server = subprocess.Popen(
        [sys.executable, str(here.with_name("dynamo_tables.py")), str(given.items)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None  # noqa: S101 - it was asked for
    url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    told: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    try:
        for _ in range(given.rounds):
            for way in WAYS:
                command = [sys.executable, str(here), "--way", way, "--url", url]
                told[way].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    finally:
        server.kill()
        server.wait()
    cpu = {way: median(each["cpu"] for each in rounds) for way, rounds in told.items()}
    for way, rounds in told.items():
        mib = median(each["mib"] for each in rounds)
        print(f"{way:22} {int(rounds[0]['rows'])} rows  {cpu[way]:6.2f} cpu s  {mib:5.0f} MiB peak")
    print(f"resource / headwater {cpu['boto3 resource + csv'] / cpu['headwater']:.1f} (goal 8)")
    print(f"headwater / floor {cpu['headwater'] / cpu['floor']:.2f} (goal 1.2)")
    read_units()


if __name__ == "__main__":
    main()
