"""Cost of a new object for summaries of many objects: `analytics_news.py STATE BUCKET ENDPOINT KEY SECRET OBJECTS`."""

import io
import json
import random
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from analytics_ways import PREFIX, hourly
from app.analytics.engine import Engine, EngineLimits
from app.analytics.summaries import Summaries
from app.db.state import open_state
from app.object_store.port import PutRequest
from app.object_store.s3 import S3Store
from app.object_store.s3_client import S3Target

ROUNDS = 5


def main() -> None:
    """Refresh with nothing new and with one new object, in turns; print the medians of CPU as JSON."""
    folder, bucket, endpoint, key, secret, objects = sys.argv[1:]
    target = S3Target(
        bucket, endpoint_url=endpoint, addressing_style="path", access_key_id=key, secret_access_key=secret
    )
    store = S3Store(target, "probe/key")
    work = Path(folder) / "work"
    work.mkdir(parents=True)
    state = open_state("", Path(folder))
    engine = Engine(work, EngineLimits(128, 2, 60))
    summaries = Summaries(store, state.summaries, engine, PREFIX, lambda: datetime.now(UTC))
    summaries.refresh()
    nothing, one_new = [], []
    for number in range(ROUNDS):
        nothing.append(refreshed_ms(summaries))
        name, content = hourly(int(objects) + number, 200, random.Random(number))
        store.put(name, io.BytesIO(content), PutRequest("application/vnd.apache.parquet"))
        one_new.append(refreshed_ms(summaries))
    engine.close()
    listing_ms = statistics.median(nothing)
    print(json.dumps({"listing_ms": listing_ms, "object_ms": statistics.median(one_new) - listing_ms}))


def refreshed_ms(summaries: Summaries) -> float:
    """CPU of one refresh."""
    before = time.process_time()
    summaries.refresh()
    return (time.process_time() - before) * 1000


if __name__ == "__main__":
    main()
