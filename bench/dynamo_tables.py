"""A server that answers Query and Scan with pre-rendered pages, so that a bench measures only the client.

Run as `python bench/dynamo_tables.py ITEMS`; prints its port. The items are those of the reference table.
"""

import json
import random
import sys
from datetime import UTC, datetime, timedelta

from simulators.http_server import Answer, Request, Server

START = datetime(2026, 2, 7, 12, tzinfo=UTC)
PAGE_ITEMS = 3300
NAMES = ("latitude", "longitude", "rho_ppb", "ph_total", "vrse", "ph_corrected", "temp", "salinity", "ph_corrected_ma")
DESCRIBED = {
    "Table": {
        "TableName": "bench",
        "TableStatus": "ACTIVE",
        "KeySchema": [
            {"AttributeName": "static_partition", "KeyType": "HASH"},
            {"AttributeName": "datetime_utc", "KeyType": "RANGE"},
        ],
        "AttributeDefinitions": [
            {"AttributeName": "static_partition", "AttributeType": "S"},
            {"AttributeName": "datetime_utc", "AttributeType": "S"},
        ],
        "TableSizeBytes": 1,
    }
}


def pages(items: int) -> list[bytes]:
    """The answers, in order. All items are within one hour, so that one file takes them."""
    draw = random.Random(1)
    made = []
    for first in range(0, items, PAGE_ITEMS):
        page = [item(number, items, draw) for number in range(first, min(first + PAGE_ITEMS, items))]
        answer = {"Items": page, "Count": len(page), "ScannedCount": len(page)}
        if first + PAGE_ITEMS < items:
            answer["LastEvaluatedKey"] = {name: page[-1][name] for name in ("static_partition", "datetime_utc")}
        made.append(json.dumps(answer, separators=(",", ":")).encode())
    return made


def item(number: int, items: int, draw: random.Random) -> dict[str, dict[str, str]]:
    """One row; a fraction of a second keeps 100,000 of them apart within an hour."""
    at = START + timedelta(seconds=3600 * number / items)
    text = f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond:06d}Z"
    values = {name: {"N": f"{draw.uniform(0, 50):.6f}"} for name in NAMES}
    return {"static_partition": {"S": "data"}, "datetime_utc": {"S": text}, **values}


def serve(items: int) -> None:
    """Answer until killed; the page follows from the key that is asked for."""
    made = pages(items)
    first, nothing = f"{START:%Y-%m-%dT%H}", json.dumps({"Items": [], "Count": 0, "ScannedCount": 0}).encode()
    last = json.loads(made[-1])["Items"][-1]
    starts = {
        json.loads(body).get("LastEvaluatedKey", {}).get("datetime_utc", {}).get("S"): at
        for at, body in enumerate(made)
    }

    def respond(request: Request) -> Answer:
        headers = {"Content-Type": "application/x-amz-json-1.0"}
        if request.headers.get("x-amz-target", "").endswith("DescribeTable"):
            return Answer(200, headers, json.dumps(DESCRIBED).encode())
        asked = json.loads(request.body)
        if asked.get("Limit") == 1:
            return Answer(200, headers, json.dumps({"Items": [last], "Count": 1, "ScannedCount": 1}).encode())
        values = asked.get("ExpressionAttributeValues", {})
        if ":low" in values and not values[":low"]["S"] <= first <= values[":high"]["S"]:
            return Answer(200, headers, nothing)  # a writing that these items do not have
        after = asked.get("ExclusiveStartKey", {}).get("datetime_utc", {})
        after = after.get("S") if isinstance(after, dict) else after
        return Answer(200, headers, made[starts[after] + 1 if after else 0])

    server = Server(("127.0.0.1", 0), respond)
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
