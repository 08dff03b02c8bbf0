"""Kills the daemon while clients post to /dwh, and looks whether each request is stored whole, once, or not at all.

`uv run python tests/dwh_kills.py [--rounds 200] [--seed 18] [--url postgresql://...]`; without a URL on SQLite. CI runs
8 rounds on each.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import httpx

from app.dwh.tables import EVENTS
from app.dwh.warehouse import open_warehouse
from daemon import Daemon, Daemons
from warehouse import Desk

CLIENTS = 6
ROWS = (1, 7, 300, 2500)
LIVES_SECONDS = (0.02, 0.6)
AWAY = (httpx.TransportError,)


@dataclass
class Posted:
    """One request: what it held and, once it was answered with 200, the ids that its rows were given."""

    name: str
    uuids: Sequence[str]
    ids: list[int] | None = None
    tries: int = 0


@dataclass
class World:
    """Clients of a daemon that is killed and started again on the same port and database."""

    daemons: Daemons
    environ: dict[str, str]
    rounds: int
    break_database: Callable[[], None] | None = None
    chance: random.Random = field(default_factory=lambda: random.Random(18))  # noqa: S311 - moments, no secret
    posted: list[Posted] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    _numbers: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """All rounds, then every request to its answer."""
        daemon = self.daemons.start("", wait=True, key="", descriptors="", **self.environ)
        self.environ["PORT"] = str(daemon.port)
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            for number in range(self.rounds):
                self._until_posting(daemon)
                time.sleep(self.chance.uniform(*LIVES_SECONDS))
                if self.break_database is not None and number % 5 == 4:
                    self.break_database()
                daemon.kill()
                daemon = self.daemons.start("", wait=True, key="", descriptors="", **self.environ)
        finally:
            self.over.set()
            for thread in threads:
                thread.join(120)
        daemon.kill()

    def _until_posting(self, daemon: Daemon) -> None:
        """The API is built a while after /health answers: kill it at work and not only at its start."""
        answered = self._answered()
        daemon.until(lambda: self._answered() > answered, 60)

    def _answered(self) -> int:
        return sum(each.ids is not None for each in list(self.posted))

    def _client(self, number: int) -> None:
        chance = random.Random(number)  # noqa: S311 - sizes, no secret
        with httpx.Client(base_url=f"http://127.0.0.1:{self.environ['PORT']}", timeout=60) as client:
            while not self.over.is_set():
                request = self._next(chance.choice(ROWS))
                while request.ids is None:
                    self._post(client, request, keyed=number % 2 == 0)

    def _next(self, rows: int) -> Posted:
        with self._lock:
            first = self._numbers
            self._numbers += rows
            request = Posted(f"request-{len(self.posted)}", [str(UUID(int=first + n + 1)) for n in range(rows)])
            self.posted.append(request)
        return request

    def _post(self, client: httpx.Client, request: Posted, *, keyed: bool) -> None:
        """Once. Half of the clients repeat with an Idempotency-Key, which gives them the ids of the first time."""
        body = {"data": [{"uuid": uuid, "event_type": request.name} for uuid in request.uuids]}
        headers = {"Idempotency-Key": request.name} if keyed else {}
        request.tries += 1
        try:
            answer = client.post("/dwh/events-part", content=json.dumps(body), headers=headers)
        except AWAY:
            time.sleep(0.05)
            return
        if answer.status_code == httpx.codes.OK:
            told = answer.json()
            if keyed:
                assert told["count"] == len(request.uuids), (request.name, told["count"])
            request.ids = told["inserted_ids"]
        else:
            assert answer.status_code in (429, 503), answer.text
            time.sleep(0.05)


def proven(world: World, url: str, folder: Path) -> Counter[str]:
    """Raises AssertionError unless every request is stored whole and once; what was counted."""
    with closing(open_warehouse(url, folder)) as warehouse:
        desk = Desk(warehouse)
        rows, after = list[dict[str, object]](), 0
        while page := desk.get(EVENTS, sort_dir="asc", limit=10_000, after_id=after):
            rows += page
            after = int(str(page[-1]["id"]))
    held: dict[object, dict[str, int]] = {}
    for row in rows:
        held.setdefault(row["event_type"], {})[str(row["uuid"])] = int(str(row["id"]))
    assert len(rows) == sum(map(len, held.values())), "a row is given twice"
    for request in world.posted:
        stored = held.pop(request.name, {})
        assert set(stored) == set(request.uuids), f"{request.name}: {len(stored)} of {len(request.uuids)} rows"
        if request.ids:
            assert request.ids == [stored[uuid] for uuid in request.uuids], f"{request.name}: other ids"
    assert held == {}
    repeated = sum(each.tries > 1 for each in world.posted)
    return Counter(requests=len(world.posted), rows=len(rows), repeated=repeated)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=18)
    parser.add_argument("--url", default="", help="a PostgreSQL database for nothing else")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="dwh-kills-") as folder, closing(Daemons(Path(folder))) as daemons:
        url = given.url or f"sqlite:///{folder}/dwh.db"
        chance = random.Random(given.seed)  # noqa: S311 - moments, no secret
        world = World(daemons, {"DWH_DATABASE_URL": url}, given.rounds, chance=chance)
        world.run()
        sys.stdout.write(f"{given.rounds} kills: {dict(proven(world, url, Path(folder)))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
