"""S3 with one bucket for the tests of the object stores, directly and through a proxy; each store in turn."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.object_store.local import LocalDirectory
from app.object_store.port import ObjectStore
from app.object_store.s3 import S3Store
from object_stores import (
    bucket,
    outside,
    proxy,
    remote,
    s3_store,
    shared_bucket,
    shared_proxy,
    shared_remote,
    shared_target,
    target,
    target_of,
)
from seaweed import Seaweed

__all__ = [
    "bucket",
    "outside",
    "proxy",
    "remote",
    "shared_bucket",
    "shared_proxy",
    "shared_remote",
    "shared_target",
    "target",
]


@pytest.fixture(scope="module")
def shared_store(seaweed: Seaweed, shared_bucket: str) -> Iterator[S3Store]:
    """One for all tests of a module: making the SDK's client takes a third of a second."""
    with s3_store(target_of(seaweed, shared_bucket)) as store:
        store.probe()
        yield store


@pytest.fixture(params=["local directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "local directory":
        local = LocalDirectory(tmp_path / "objects")
        local.probe()
        return local
    request.getfixturevalue("bucket")
    shared: S3Store = request.getfixturevalue("shared_store")
    return shared
