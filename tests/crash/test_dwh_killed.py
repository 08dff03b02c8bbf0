"""The daemon is killed over and over while clients post to /dwh: each request is stored whole and once."""

from pathlib import Path

import pytest

from daemon import Daemons
from dwh_kills import World, proven
from effort import EFFORT
from postgres import PostgresServer

ROUNDS = 8 * EFFORT


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_kills_on_sqlite(daemons: Daemons, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/killed.db"
    world = World(daemons, {"DWH_DATABASE_URL": url}, ROUNDS)
    world.run()
    assert proven(world, url, tmp_path)["repeated"] > ROUNDS // 2


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_kills_on_postgresql_some_of_them_together_with_the_database(
    postgres_server: PostgresServer, daemons: Daemons, tmp_path: Path
) -> None:
    url = postgres_server.new_database()
    world = World(daemons, {"DWH_DATABASE_URL": url}, ROUNDS, postgres_server.restart_immediately)
    world.run()
    assert proven(world, url, tmp_path)["repeated"] > ROUNDS // 2
