"""DynamoDB to CSV: `uv run --with orjson python bench/dynamo_to_drive.py [--items 100000] [--repeat 3] [--times 4]`.

Each way runs in its own process, in turns. CPU covers reading only: modules are loaded and the SDK's client is created
before, as in a daemon, and that cost is printed separately. The floor is the bytes over HTTP plus orjson. Also measures
the memory at `--times` as many items, and the read units of Query and Scan.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from dynamo_tables import START
from measured import Cost, Goal, in_turns, run

HERE = Path(__file__)
KEYS = {"aws_access_key_id": "b", "aws_secret_access_key": "b", "region_name": "us-east-1"}
FLOOR, ORDINARY, OURS = "floor: HTTP and orjson", "boto3 resource and csv", "headwater"
Reading = Callable[[], int]


def floor(url: str) -> Reading:
    """The pages as bytes, parsed to dicts."""
    import orjson

    def read() -> int:
        rows, key = 0, None
        while True:
            body = json.dumps({"ExclusiveStartKey": key} if key else {}).encode()
            request = urllib.request.Request(url, body, {"X-Amz-Target": "DynamoDB_20120810.Query"})  # noqa: S310 - loopback
            with urllib.request.urlopen(request) as answer:  # noqa: S310 - loopback
                page = orjson.loads(answer.read())
            rows += len(page["Items"])
            key = page.get("LastEvaluatedKey")
            if key is None:
                return rows

    return read


def ordinary(url: str) -> Reading:
    """boto3's resource and csv.DictWriter, as people write it."""
    import boto3
    from boto3.dynamodb.conditions import Key

    table = boto3.resource("dynamodb", endpoint_url=url, **KEYS).Table("bench")
    table.load()

    def read() -> int:
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

    return read


def ours(url: str) -> Reading:
    """The product's source: the whole file of the hour with its digest."""
    from app.config.settings import DynamoSettings
    from app.core.pipeline import UNCOUNTED
    from app.core.runs import Stop
    from app.core.windows import Window
    from app.dynamo_to_drive.accounts import Accounts
    from app.dynamo_to_drive.source import DynamoSource
    from app.dynamo_to_drive.table import DynamoTable

    given = {"DYNAMODB_TABLE_NAME": "bench", "DYNAMODB_TIMESTAMP_UNIT": "s", "DYNAMODB_ENDPOINT_URL": url}
    keys = {"AWS_ACCESS_KEY_ID": "b", "AWS_SECRET_ACCESS_KEY": "b"}
    table = DynamoTable(DynamoSettings.model_validate({**given, **keys}))
    table.plan()

    def read() -> int:
        source = DynamoSource(table, "bench", Stop(), accounts=Accounts("datetime_utc"), now=START + timedelta(hours=1))
        hour = source.read("bench", Window(START, START + timedelta(hours=1)), UNCOUNTED, None)
        hour.close()
        return hour.rows

    return read


WAYS: Mapping[str, Callable[[str], Reading]] = {FLOOR: floor, ORDINARY: ordinary, OURS: ours}


def once(way: str, url: str) -> None:
    """Run a way in this process and print what it took."""
    read = WAYS[way](url)
    before = resource.getrusage(resource.RUSAGE_SELF)
    rows = read()
    after = resource.getrusage(resource.RUSAGE_SELF)
    ready, done = (used.ru_utime + used.ru_stime for used in (before, after))
    print(json.dumps({"rows": rows, "cpu": done - ready, "ready": ready, "mib": after.ru_maxrss / 1024}))


def timed(way: str, url: str) -> Cost:
    """A way in a process of its own."""
    return run([sys.executable, str(HERE), "--way", way, "--url", url])


@contextmanager
def serving(items: int) -> Iterator[str]:
    """The address of a server with so many items in an hour."""
    command = [sys.executable, str(HERE.with_name("dynamo_tables.py")), str(items)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None  # noqa: S101 - it was asked for
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.kill()


def read_units() -> None:
    """Six new rows among 20,000: what Query and Scan read, and what the look around costs once an hour."""
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
                first = ship.dynamo.read_units
                ship.run()
                again = ship.dynamo.read_units - first
                print(
                    f"read units of one run, 6 new rows among 20,000: {name} {again:g}, the first of an hour {first:g}"
                )


def told(costs: Mapping[str, Cost]) -> str:
    """Markdown."""
    lines = ["| way | CPU s | CPU s before, once | peak MiB |", "|---|---|---|---|"]
    for way, cost in costs.items():
        lines.append(f"| {way} | {cost.told['cpu']:.2f} | {cost.told['ready']:.2f} | {cost.told['mib']:.0f} |")
    return "\n".join(lines)


def goals(costs: Mapping[str, Cost], larger: Cost) -> Iterator[Goal]:
    """The figures of the performance page."""
    cpu = {way: cost.told["cpu"] for way, cost in costs.items()}
    whole = {way: cost.told["cpu"] + cost.told["ready"] for way, cost in costs.items()}
    yield Goal("cpu of the resource / ours", cpu[ORDINARY] / cpu[OURS], 8)
    yield Goal("our cpu / floor", cpu[OURS] / cpu[FLOOR], 1.2, at_least=False)
    yield Goal("cpu of the resource / ours, each with its start", whole[ORDINARY] / whole[OURS], 8)
    yield Goal("our cpu / floor, each with its start", whole[OURS] / whole[FLOOR], 1.2, at_least=False)
    peak, grown = costs[OURS].told["mib"], larger.told["mib"]
    yield Goal("peak memory", peak, 110, at_least=False, unit=" MiB")
    yield Goal(f"peak memory at {larger.told['rows']:.0f} items", grown, peak + 5, at_least=False, unit=" MiB")


def main() -> None:
    """Serve the pages, run the ways in turns, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--times", type=int, default=4, help="as many more items for the second look at memory")
    parser.add_argument("--way")
    parser.add_argument("--url")
    given = parser.parse_args()
    if given.way:
        once(given.way, given.url)
        return
    with serving(given.items) as url:
        costs = in_turns({way: partial(timed, way, url) for way in WAYS}, given.repeat)
    with serving(given.items * given.times) as url:
        larger = timed(OURS, url)
    print(f"{given.items} items, median of {given.repeat}\n\n{told(costs)}\n")
    for goal in goals(costs, larger):
        print(goal)
    read_units()


if __name__ == "__main__":
    main()
