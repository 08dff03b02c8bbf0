"""A real server of Spark Connect."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def sail_server() -> Iterator[str]:
    """Sail's, whose package needs no Java; what SPARK_REMOTE is set to."""
    from pysail.spark import SparkConnectServer

    server = SparkConnectServer("127.0.0.1", 0)
    server.start(background=True)
    yield f"sc://127.0.0.1:{server.listening_address[1]}"
    server.stop()


@pytest.fixture
def sail(sail_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server, for a client in this process. Spark's takes a program without a file, as a worker of pytest is, for
    its own doctests and ends it.
    """
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    return sail_server
