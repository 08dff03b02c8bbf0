"""Object stores as the tests of their contract use them, and S3 with one bucket, directly and through a proxy."""

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from app.object_store.port import ObjectStore, PutRequest
from app.object_store.s3 import S3Store
from app.object_store.s3_client import S3Target
from fault_proxy import FaultProxy
from seaweed import Seaweed

CREATE = PutRequest("text/plain", expected="")
ANY = PutRequest("text/plain")


def put(store: ObjectStore, key: str, data: bytes, how: PutRequest = ANY) -> str:
    return store.put(key, io.BytesIO(data), how)


def get(store: ObjectStore, key: str, etag: str | None = None) -> bytes | None:
    with store.open(key, etag) as stream:
        return None if stream is None else stream.read()


def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def target_of(seaweed: Seaweed, bucket: str) -> S3Target:
    return S3Target(
        bucket=bucket,
        endpoint_url=seaweed.endpoint_url,
        addressing_style="path",
        access_key_id=seaweed.access_key,
        secret_access_key=seaweed.secret_key,
        page_keys=7,
    )


@contextmanager
def s3_store(target: S3Target) -> Iterator[S3Store]:
    store = S3Store(target, "telemetry/.headwater-probe-test")
    try:
        yield store
    finally:
        store.close()


@pytest.fixture(scope="module")
def shared_bucket(seaweed: Seaweed) -> str:
    return seaweed.new_bucket()


@pytest.fixture(scope="module")
def outside(seaweed: Seaweed) -> Iterator[Any]:
    with closing(seaweed.client()) as client:
        yield client


@pytest.fixture
def bucket(outside: Any, shared_bucket: str) -> str:
    """One for all tests, for a new one takes a third of a second; empty at the start of each."""
    for found in outside.list_objects_v2(Bucket=shared_bucket).get("Contents", ()):
        outside.delete_object(Bucket=shared_bucket, Key=found["Key"])
    return shared_bucket


@pytest.fixture(scope="module")
def shared_proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.host, seaweed.port) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy) -> Iterator[FaultProxy]:
    shared_proxy.seen.clear()
    yield shared_proxy
    shared_proxy.clear()


@pytest.fixture(scope="module")
def shared_target(seaweed: Seaweed, shared_proxy: FaultProxy, shared_bucket: str) -> S3Target:
    """Through the proxy, and impatient."""
    direct = replace(target_of(seaweed, shared_bucket), endpoint_url=shared_proxy.url)
    return replace(direct, read_timeout_seconds=0.5, connect_timeout_seconds=0.5, attempts=2)


@pytest.fixture(scope="module")
def shared_remote(shared_target: S3Target) -> Iterator[S3Store]:
    with s3_store(shared_target) as store:
        store.probe()
        yield store


@pytest.fixture
def target(shared_target: S3Target, bucket: str) -> S3Target:
    assert bucket == shared_target.bucket
    return shared_target


@pytest.fixture
def remote(shared_remote: S3Store, target: S3Target, proxy: FaultProxy) -> S3Store:
    assert proxy.url == target.endpoint_url
    return shared_remote
