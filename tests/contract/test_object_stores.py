"""What every object store promises, on a directory and on a real S3 server; then what only one can get wrong."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient
from app.stores.local_directory import LocalDirectory
from app.stores.objects import ObjectInfo, ObjectStore, Put
from app.stores.s3 import S3Store, old_probes
from app.stores.s3_client import S3Target
from fault_proxy import (
    Fault,
    FaultProxy,
    Request,
    answer,
    answer_afterwards,
    black_hole,
    cut_request,
    lose_answer,
    reset,
    truncate,
)
from seaweed import Seaweed

CREATE = Put("text/plain", expected="")
ANY = Put("text/plain")
STRANGE_KEYS = (
    "device_id=ü 1/date=2026/02/07/export_120000.parquet",
    "a b/100%.csv",
    "a+b/c?d#e&f.txt",
    "日本語/😀.txt",
    "quote'\"<x>/~tilde!*().txt",
    "a%20b/%2e%2e.txt",
)
BAD_KEYS = ("", "/a", "a/", "a//b", "a/../b", "./a", "..", "a\nb", "a\x00b", "a\x7f", "k" * 1025, "ü" * 513, "a\ud800b")


def put(store: ObjectStore, key: str, data: bytes, how: Put = ANY) -> str:
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
def shared_store(seaweed: Seaweed, shared_bucket: str) -> Iterator[S3Store]:
    """One for all tests as well: making the SDK's client takes a third of a second."""
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


class TestEveryStore:
    @pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_001])
    def test_bytes_come_back_as_they_were(self, store: ObjectStore, size: int) -> None:
        data = os.urandom(size)
        etag = put(store, "a/b.bin", data)
        assert get(store, "a/b.bin") == data
        assert get(store, "a/b.bin", etag) == data

    def test_properties_and_metadata_come_back(self, store: ObjectStore) -> None:
        metadata = {"Rows": "12", "digest": "a b=c/ü".encode().hex(), "app-version": "1.0 (x; y)"}
        etag = put(store, "a/b", b"12345", Put("application/vnd.apache.parquet", metadata))
        info = store.head("a/b")
        assert info is not None
        assert (info.key, info.size_bytes, info.etag) == ("a/b", 5, etag)
        assert info.content_type == "application/vnd.apache.parquet"
        assert info.metadata == {name.lower(): value for name, value in metadata.items()}
        assert info.modified_at.utcoffset() == timedelta(0)
        assert abs(info.modified_at - datetime.now(UTC)) < timedelta(minutes=5)

    def test_only_the_rest_of_the_body_is_stored_and_the_caller_keeps_the_stream(self, store: ObjectStore) -> None:
        body = io.BytesIO(b"headbody")
        body.seek(4)
        store.put("k", body, ANY)
        assert get(store, "k") == b"body"
        assert not body.closed

    def test_what_is_missing_is_none(self, store: ObjectStore) -> None:
        put(store, "a/b", b"1")
        for key in ("missing", "a", "a/b/c"):
            assert store.head(key) is None
            assert get(store, key) is None
        assert get(store, "missing", '"x"') is None

    def test_a_create_succeeds_once(self, store: ObjectStore) -> None:
        put(store, "k", b"first", CREATE)
        with pytest.raises(Conflict):
            put(store, "k", b"again", CREATE)
        assert get(store, "k") == b"first"

    def test_a_put_with_the_right_etag_replaces_all(self, store: ObjectStore) -> None:
        first = put(store, "k", b"first", Put("text/plain", {"rows": "1"}))
        second = put(store, "k", b"second", Put("text/csv", {"sum": "2"}, first))
        info = store.head("k")
        assert info is not None
        assert (info.etag, info.content_type, info.metadata) == (second, "text/csv", {"sum": "2"})
        assert get(store, "k") == b"second"

    def test_a_put_with_a_stale_etag_changes_nothing(self, store: ObjectStore) -> None:
        stale = put(store, "k", b"one", Put("text/plain", {"rows": "1"}))
        put(store, "k", b"two", Put("text/plain", {"rows": "2"}))
        before = store.head("k")
        with pytest.raises(Conflict):
            put(store, "k", b"three", Put("text/csv", {"rows": "3"}, stale))
        assert store.head("k") == before
        assert get(store, "k") == b"two"

    def test_a_put_with_an_etag_creates_nothing(self, store: ObjectStore) -> None:
        etag = put(store, "k", b"one")
        store.delete("k")
        with pytest.raises(Conflict):
            put(store, "k", b"two", replace(ANY, expected=etag))
        assert store.head("k") is None

    def test_a_change_of_content_changes_the_etag_also_at_the_same_length(self, store: ObjectStore) -> None:
        etags = [put(store, "k", data) for data in (b"aaaa", b"bbbb", b"cccc", b"dddd", b"eeee", b"ffff")]
        assert len(set(etags)) == len(etags)

    def test_one_of_eight_wins_each_round(self, store: ObjectStore) -> None:
        writers, start = 8, threading.Barrier(8)

        def write(number: int, expected: str) -> str | None:
            start.wait(20)
            try:
                return put(store, "race", f"{expected} {number}".encode(), replace(ANY, expected=expected))
            except Conflict:
                return None

        expected = ""
        with ThreadPoolExecutor(writers) as pool:
            for _ in range(2):
                won = [etag for etag in pool.map(write, range(writers), [expected] * writers) if etag is not None]
                assert len(won) == 1
                info = store.head("race")
                assert info is not None
                assert info.etag == won[0]
                expected = won[0]

    def test_a_reader_of_a_stale_version_gets_a_conflict(self, store: ObjectStore) -> None:
        stale = put(store, "k", b"one")
        put(store, "k", b"two")
        with pytest.raises(Conflict):
            get(store, "k", stale)

    def test_a_reader_never_sees_two_versions_in_one(self, store: ObjectStore) -> None:
        put(store, "k", b"\0" * 200_000)
        done = threading.Event()

        def write() -> None:
            for number in range(1, 16):
                put(store, "k", bytes([number]) * (200_000 + number))
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            while not done.is_set():
                data = get(store, "k")
                assert data is not None
                assert data == data[:1] * (200_000 + data[0])
        finally:
            writer.join()

    def test_a_listing_has_all_pages_in_order_and_only_the_prefix(self, store: ObjectStore) -> None:
        made = [f"telemetry/device_id={device}/export_{number:06}" for device in "ab" for number in range(10)]
        for key in (*reversed(made), "telemetrz", "other/x"):
            put(store, key, key.encode())
        assert keys(store, "telemetry/") == made
        assert keys(store, "telemetry/device_id=b/export_00000") == made[10:]
        assert keys(store, "telemetr") == [*made, "telemetrz"]
        assert keys(store) == ["other/x", *made, "telemetrz"]
        assert keys(store, "nothing/here/") == []
        first = next(iter(store.list("telemetry/")))
        head = store.head(first.key)
        assert head is not None
        assert (first.size_bytes, first.etag) == (head.size_bytes, head.etag)

    def test_deleting_twice_is_deleting_once(self, store: ObjectStore) -> None:
        put(store, "a/b/c", b"1")
        put(store, "a/d", b"2")
        store.delete("a/b/c")
        store.delete("a/b/c")
        store.delete("a/b/never")
        assert keys(store) == ["a/d"]
        put(store, "a/b", b"now an object where a folder was")

    def test_strange_keys_are_kept_to_the_letter(self, store: ObjectStore) -> None:
        for key in STRANGE_KEYS:
            etag = put(store, key, key.encode())
            assert get(store, key, etag) == key.encode()
            assert keys(store) == [key]
            assert keys(store, key[:-2]) == [key]
            store.delete(key)
            assert store.head(key) is None

    def test_bad_keys_are_refused(self, store: ObjectStore) -> None:
        uses: tuple[Callable[[str], object], ...] = (
            store.head,
            store.delete,
            lambda key: get(store, key),
            lambda key: put(store, key, b"1"),
        )
        for key in BAD_KEYS:
            for use in uses:
                with pytest.raises(Rejected):
                    use(key)
        assert keys(store) == []

    def test_a_prefix_that_no_key_can_have_finds_nothing(self, store: ObjectStore) -> None:
        put(store, "a/b", b"1")
        for prefix in ("../", "a/../../", "/", "//", "a//", "a\x00/", "./"):
            assert keys(store, prefix) == []

    def test_a_prefix_that_is_not_unicode_finds_nothing_or_is_refused(self, store: ObjectStore) -> None:
        with suppress(Rejected):
            assert keys(store, "a\ud800") == []

    def test_an_error_of_the_caller_passes_through_an_open_download(self, store: ObjectStore) -> None:
        put(store, "k", b"1" * 1_000_000)
        with pytest.raises(OSError, match="the caller's own"), store.open("k"):
            raise OSError("the caller's own")


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


@pytest.fixture(scope="module")
def hasty(shared_target: S3Target) -> Iterator[S3Store]:
    with s3_store(replace(shared_target, attempts=1, read_timeout_seconds=0.05)) as store:
        yield store


@pytest.fixture
def target(shared_target: S3Target, bucket: str) -> S3Target:
    assert bucket == shared_target.bucket
    return shared_target


@pytest.fixture
def remote(shared_remote: S3Store, target: S3Target, proxy: FaultProxy) -> S3Store:
    assert proxy.url == target.endpoint_url
    return shared_remote


def conditional(request: Request) -> bool:
    return "if-match" in request.headers or "if-none-match" in request.headers


PLAY_ALL: tuple[Fault, ...] = (
    answer(500, b"<Error><Code>InternalError</Code><Message>m</Message></Error>"),
    answer(503, b"<html>busy</html>", {"Retry-After": "7"}),
    answer(200, b"<html>a login page</html>", {"Content-Type": "text/html"}),
    answer(200, b"<Error><Code>InternalError</Code>"),
    answer(301, b"", {"x-amz-bucket-region": "eu-west-1"}),
    answer(301, b"", {"Location": "https://127.0.0.1/"}),
    answer(302, b"<html>moved</html>", {"Location": "/"}),
    answer(307, b"", {"Location": "http://127.0.0.1:1/"}),
    answer(400, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>"),
    answer(403, b"<Error><Code>RequestTimeTooSkewed</Code></Error>"),
    answer(404, b"not found"),
    answer(405, b""),
    answer(409, b"<Error><Code>OperationAborted</Code></Error>"),
    answer(411, b"<Error><Code>MissingContentLength</Code></Error>"),
    answer(416, b"<Error><Code>InvalidRange</Code></Error>"),
    answer(501, b"<Error><Code>NotImplemented</Code></Error>"),
    reset(),
    black_hole(),
    lose_answer(),
    cut_request(3),
    truncate(0),
    truncate(5),
)


class TestS3:
    def test_conditions_are_known_to_hold_only_after_the_probe_which_leaves_nothing(self, target: S3Target) -> None:
        with s3_store(target) as store:
            put(store, "k", b"1", CREATE)
            with pytest.raises(Conflict):
                put(store, "k", b"2", CREATE)
            assert not store.conditional
            store.probe()
            assert store.conditional
            assert keys(store) == ["k"]

    def test_only_probes_that_no_process_is_still_at_count_as_old(self) -> None:
        at = datetime(2026, 2, 7, 12, tzinfo=UTC)
        ages = {"mine": 0, "young": 59, "killed": 61}
        probes = [ObjectInfo(name, 5, '"e"', at - timedelta(minutes=minutes)) for name, minutes in ages.items()]
        assert old_probes(probes) == ["killed"]
        assert old_probes([]) == []

    def test_one_500_is_retried(self, remote: S3Store, proxy: FaultProxy) -> None:
        proxy.add(answer(500), "PUT")
        put(remote, "k", b"1", CREATE)
        assert get(remote, "k") == b"1"

    def test_a_store_that_stays_busy_is_transient_in_bounded_time(self, remote: S3Store, proxy: FaultProxy) -> None:
        proxy.add(answer(503, b"<Error><Code>SlowDown</Code></Error>", {"Retry-After": "3"}), times=100)
        began = time.monotonic()
        with pytest.raises(Transient) as caught:
            put(remote, "k", b"1", CREATE)
        assert caught.value.retry_after_seconds == 3
        assert not isinstance(caught.value, Conflict)
        assert len(proxy.seen) == 2
        assert time.monotonic() - began < 5

    def test_a_put_whose_answer_was_lost_is_a_conflict_with_our_own_metadata(
        self, remote: S3Store, proxy: FaultProxy
    ) -> None:
        proxy.add(lose_answer(), "PUT")
        with pytest.raises(Conflict):
            put(remote, "k", b"1", Put("text/plain", {"digest": "ours"}, ""))
        info = remote.head("k")
        assert info is not None
        assert info.metadata == {"digest": "ours"}

    def test_a_put_that_was_stored_and_answered_500_is_a_conflict_too(self, remote: S3Store, proxy: FaultProxy) -> None:
        etag = put(remote, "k", b"1")
        proxy.add(answer_afterwards(500), "PUT")
        with pytest.raises(Conflict):
            put(remote, "k", b"2", Put("text/plain", {"digest": "ours"}, etag))
        info = remote.head("k")
        assert info is not None
        assert info.metadata == {"digest": "ours"}

    def test_a_repeated_put_sends_the_rest_of_the_body_again(self, remote: S3Store, proxy: FaultProxy) -> None:
        proxy.add(cut_request(100_000), "PUT")
        body = io.BytesIO(b"head" + b"b" * 300_000)
        body.seek(4)
        remote.put("k", body, CREATE)
        assert get(remote, "k") == b"b" * 300_000

    def test_a_broken_download_is_resumed_on_the_same_version(self, remote: S3Store, proxy: FaultProxy) -> None:
        data = os.urandom(1_000_000)
        etag = put(remote, "k", data)
        for after_bytes in (0, 1, 300_000):
            proxy.add(truncate(after_bytes), "GET")
        assert get(remote, "k") == data
        resumed = [seen.headers for seen in proxy.seen if "range" in seen.headers]
        assert [headers["range"] for headers in resumed] == ["bytes=0-", "bytes=1-", "bytes=300001-"]
        assert {headers["if-match"] for headers in resumed} == {etag}

    def test_a_download_that_stays_broken_is_transient_and_never_short(
        self, remote: S3Store, proxy: FaultProxy
    ) -> None:
        put(remote, "k", b"d" * 100_000)
        proxy.add(truncate(1), "GET", times=1000)
        with pytest.raises(Transient, match="broke off 9 times"):
            get(remote, "k")

    def test_a_download_whose_object_is_replaced_meanwhile_is_a_conflict(
        self, remote: S3Store, proxy: FaultProxy
    ) -> None:
        put(remote, "k", b"1" * 1_000_000)
        proxy.add(truncate(400_000), "GET")
        with remote.open("k") as stream:
            assert stream is not None
            assert stream.read(1000) == b"1" * 1000
            put(remote, "k", b"2" * 1_000_000)
            with pytest.raises(Conflict):
                stream.read()

    def test_a_black_hole_is_transient_in_bounded_time(self, remote: S3Store, proxy: FaultProxy) -> None:
        proxy.add(black_hole(), times=100)
        began = time.monotonic()
        with pytest.raises(Transient):
            remote.head("k")
        assert time.monotonic() - began < 5

    def test_an_outage_is_transient_and_then_over(self, remote: S3Store, proxy: FaultProxy) -> None:
        proxy.refuse()
        with pytest.raises(Transient):
            put(remote, "k", b"1", CREATE)
        proxy.allow()
        put(remote, "k", b"1", CREATE)

    def test_a_failing_second_page_fails_the_listing(self, remote: S3Store, proxy: FaultProxy) -> None:
        for number in range(9):
            put(remote, f"k{number}", b"1")
        proxy.add(answer(503), "GET", "*continuation-token=*", times=100)
        with pytest.raises(Transient):
            keys(remote)

    def test_a_conflict_with_another_write_is_repeated_for_a_create(self, remote: S3Store, proxy: FaultProxy) -> None:
        busy = answer(409, b"<Error><Code>ConditionalRequestConflict</Code></Error>")
        proxy.add(busy, "PUT", times=2)
        etag = put(remote, "k", b"1", CREATE)
        proxy.add(busy, "PUT")
        with pytest.raises(Conflict):
            put(remote, "k", b"2", replace(ANY, expected=etag))
        assert get(remote, "k") == b"1"

    def test_a_replacement_of_a_missing_object_is_a_conflict_where_the_store_says_404(
        self, remote: S3Store, proxy: FaultProxy
    ) -> None:
        proxy.add(answer(404, b"<Error><Code>NoSuchKey</Code></Error>"), "PUT")
        with pytest.raises(Conflict):
            put(remote, "k", b"2", replace(ANY, expected='"x"'))

    def test_wrong_keys_name_the_variables(self, seaweed: Seaweed, target: S3Target) -> None:
        for wrong in (replace(target, secret_access_key="wrong"), replace(target, access_key_id="wrong")):
            with s3_store(wrong) as store, pytest.raises(Permanent) as caught:
                store.probe()
            assert "S3_SECRET_ACCESS_KEY" in caught.value.hint
            assert seaweed.secret_key not in str(caught.value)
            assert seaweed.secret_key not in repr(wrong)

    def test_a_missing_bucket_is_never_a_missing_object(self, target: S3Target) -> None:
        uses: tuple[Callable[[S3Store], object], ...] = (
            S3Store.probe,
            keys,
            lambda store: store.head("k"),
            lambda store: get(store, "k"),
            lambda store: put(store, "k", b"1"),
            lambda store: store.delete("k"),
        )
        for use in uses:
            with s3_store(replace(target, bucket="no-such-bucket")) as store, pytest.raises(Permanent) as caught:
                use(store)
            assert "bucket 'no-such-bucket' does not exist" in str(caught.value)
            assert "S3_BUCKET" in caught.value.hint

    @pytest.mark.parametrize(
        ("said", "hint"),
        [
            (answer(301, b"<Error><Code>PermanentRedirect</Code></Error>"), "S3_REGION"),
            (answer(400, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>"), "S3_REGION"),
            (answer(403, b"<Error><Code>RequestTimeTooSkewed</Code></Error>"), "clock"),
            (answer(403, b"<Error><Code>AccessDenied</Code></Error>"), "S3_ACCESS_KEY_ID"),
            (answer(501, b"<Error><Code>NotImplemented</Code></Error>"), "S3_ENDPOINT_URL"),
        ],
        ids=range(5),
    )
    def test_what_a_person_must_mend_is_permanent(
        self, remote: S3Store, proxy: FaultProxy, said: Fault, hint: str
    ) -> None:
        proxy.add(said, times=10)
        with pytest.raises(Permanent) as caught:
            put(remote, "k", b"1")
        assert hint in caught.value.hint

    @pytest.mark.parametrize(
        "wrong",
        [
            {"endpoint_url": "no url at all"},
            {"endpoint_url": "http://[::1"},
            {"bucket": "not a bucket name!"},
            {"region": "not a region"},
            {"addressing_style": "sideways"},
            {"secret_access_key": ""},
        ],
        ids=str,
    )
    def test_settings_that_cannot_work_are_permanent(self, target: S3Target, wrong: dict[str, str]) -> None:
        with s3_store(replace(target, **wrong)) as store, pytest.raises(Permanent):  # type: ignore[arg-type]  # all text
            store.probe()

    @pytest.mark.parametrize(
        "fault", PLAY_ALL, ids=lambda fault: f"{fault.name} {fault.instead and fault.instead.status}"
    )
    def test_no_foreign_exception_escapes(self, hasty: S3Store, proxy: FaultProxy, fault: Fault) -> None:
        uses: tuple[Callable[[S3Store], object], ...] = (
            S3Store.probe,
            keys,
            lambda store: store.head("k"),
            lambda store: get(store, "k"),
            lambda store: put(store, "k", b"12345678", CREATE),
            lambda store: put(store, "k", b"12345678", replace(ANY, expected='"x"')),
            lambda store: store.delete("k"),
        )
        for use in uses:
            proxy.clear()
            proxy.add(fault, times=100)
            with suppress(AppError):
                use(hasty)
        assert len(proxy.seen) < 60

    @pytest.mark.parametrize(
        "fault", [answer_afterwards(200, headers={"ETag": '"any"'}), answer(501)], ids=["ignored", "not implemented"]
    )
    def test_a_store_without_conditions_is_found_out_and_the_check_is_made_by_head(
        self, target: S3Target, proxy: FaultProxy, fault: Fault
    ) -> None:
        proxy.add(fault, "PUT", times=1000, fits=conditional)
        with s3_store(target) as store:
            store.probe()
            assert not store.conditional
            etag = put(store, "k", b"1", CREATE)
            with pytest.raises(Conflict):
                put(store, "k", b"2", CREATE)
            put(store, "k", b"3", replace(ANY, expected=etag))
            with pytest.raises(Conflict):
                put(store, "k", b"4", replace(ANY, expected=etag))
            assert get(store, "k") == b"3"

    def test_with_the_sdks_checksums_a_download_that_changed_on_the_way_is_transient(
        self, target: S3Target, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", target.endpoint_url)
        with s3_store(replace(target, endpoint_url="")) as store:
            etag = put(store, "k", b"12345")
            assert get(store, "k", etag) == b"12345"
            assert "x-amz-checksum-crc32" in proxy.seen[0].headers
            headers = {
                "ETag": etag,
                "x-amz-checksum-crc32": "AAAAAA==",
                "Last-Modified": "Sun, 22 Nov 2026 02:42:40 GMT",
            }
            proxy.add(answer(200, b"12346", headers), "GET")
            with pytest.raises(Transient, match="not what was stored"):
                get(store, "k", etag)

    def test_a_key_that_may_not_delete_can_still_probe(self, target: S3Target, proxy: FaultProxy) -> None:
        proxy.add(answer(403, b"<Error><Code>AccessDenied</Code></Error>"), "DELETE")
        with s3_store(target) as store:
            store.probe()
            assert store.conditional

    def test_metadata_that_headers_cannot_carry_is_rejected(self, remote: S3Store) -> None:
        for metadata in ({"a": "ü"}, {"a": "x\ny"}, {"a": " x"}, {"ä": "x"}, {"a": "x" * 2048}):
            with pytest.raises(Rejected):
                put(remote, "k", b"1", Put("text/plain", metadata))
        assert keys(remote) == []

    def test_more_than_one_upload_may_have_is_rejected(self, remote: S3Store, tmp_path: Path) -> None:
        with (tmp_path / "sparse").open("w+b") as file:
            file.truncate((5 << 30) + 1)
            with pytest.raises(Rejected, match="5 GiB"):
                remote.put("k", file, ANY)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def local(root: Path) -> LocalDirectory:
    return LocalDirectory(root)


DIE_BEFORE_RENAME = """
import io, os, signal, sys
from pathlib import Path
from typing import Any
from app.stores.local_directory import LocalDirectory
from app.stores.objects import Put

def die(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
note = {"rows": "2", "long": "x" * int(sys.argv[3])}
LocalDirectory(Path(sys.argv[1])).put("a/k", io.BytesIO(b"new bytes"), Put("text/new", note))
"""
TOO_LONG = 100_000  # for an extended attribute, which holds 64 KiB at most on any file system of Linux

ADD_ONE_BY_ONE = """
import io, sys
from pathlib import Path
from typing import Any
from app.core.errors import Conflict
from app.stores.local_directory import LocalDirectory
from app.stores.objects import Put

store, done = LocalDirectory(Path(sys.argv[1])), 0
while done < int(sys.argv[2]):
    info = store.head("sum")
    try:
        with store.open("sum", info.etag if info else None) as stream:
            found = int(stream.read()) if stream else 0
        store.put("sum", io.BytesIO(b"%d" % (found + 1)), Put("text/plain", expected=info.etag if info else ""))
    except Conflict:
        continue
    done += 1
"""


def start(program: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)])


class TestLocalDirectory:
    def test_conditions_are_said_to_hold_only_after_the_probe_which_leaves_nothing(self, local: LocalDirectory) -> None:
        assert not local.conditional
        local.probe()
        assert local.conditional
        assert keys(local) == []

    @pytest.mark.parametrize("long", [0, TOO_LONG])
    def test_metadata_of_any_length_comes_back(self, local: LocalDirectory, root: Path, long: int) -> None:
        for number in ("1", "2"):
            put(local, "a/k", number.encode(), Put("text/x", {"rows": number, "long": "x" * long}))
            info = local.head("a/k")
            assert info is not None
            assert (info.content_type, info.metadata) == ("text/x", {"rows": number, "long": "x" * long})
        (root / "a" / "k").write_bytes(b"changed by another program")
        info = local.head("a/k")
        assert info is not None
        assert info.metadata == {}

    def test_a_kill_before_the_rename_changes_nothing(self, local: LocalDirectory, root: Path) -> None:
        put(local, "a/k", b"old bytes", Put("text/old", {"rows": "1"}))
        before = local.head("a/k")
        assert start(DIE_BEFORE_RENAME, root, "a/k", 0).wait(20) == -signal.SIGKILL
        assert local.head("a/k") == before
        assert get(local, "a/k") == b"old bytes"

    def test_a_kill_between_note_and_rename_costs_metadata_and_never_lies(
        self, local: LocalDirectory, root: Path
    ) -> None:
        etag = put(local, "a/k", b"old bytes", Put("text/old", {"rows": "1", "long": "y" * TOO_LONG}))
        assert start(DIE_BEFORE_RENAME, root, "a/k", TOO_LONG).wait(20) == -signal.SIGKILL
        assert get(local, "a/k", etag) == b"old bytes"
        info = local.head("a/k")
        assert info is not None
        assert (info.etag, info.metadata) == (etag, {})
        put(local, "a/k", b"next", Put("text/next", {"rows": "3"}, etag))
        info = local.head("a/k")
        assert info is not None
        assert (info.content_type, info.metadata) == ("text/next", {"rows": "3"})

    def test_a_kill_before_the_note_changes_nothing(self, local: LocalDirectory, root: Path) -> None:
        put(local, "a/k", b"old bytes", Put("text/old", {"rows": "1"}))
        before = local.head("a/k")
        assert start(DIE_BEFORE_RENAME, root, ".json", TOO_LONG).wait(20) == -signal.SIGKILL
        assert local.head("a/k") == before
        assert get(local, "a/k") == b"old bytes"

    def test_leftovers_of_killed_writers_go_with_a_probe_when_they_are_old(
        self, local: LocalDirectory, root: Path
    ) -> None:
        assert start(DIE_BEFORE_RENAME, root, "a/k", 0).wait(20) == -signal.SIGKILL
        (leftover,) = (root / ".headwater" / "tmp").iterdir()
        local.probe()
        assert leftover.exists()
        os.utime(leftover, (0, 0))
        local.probe()
        assert not leftover.exists()
        assert keys(local) == []

    def test_two_processes_lose_no_update(self, local: LocalDirectory, root: Path) -> None:
        writers = [start(ADD_ONE_BY_ONE, root, 25) for _ in range(2)]
        assert [writer.wait(60) for writer in writers] == [0, 0]
        assert get(local, "sum") == b"50"

    def test_an_etag_never_comes_back_while_the_clock_stands_still(self, root: Path) -> None:
        store = LocalDirectory(root, lambda: 1_700_000_000_000_000_000)
        etags = [put(store, "k", b"same") for _ in range(40)]
        assert len(set(etags)) == len(etags)

    def test_a_clock_that_was_set_back_does_not_bring_an_etag_back(self, root: Path) -> None:
        backwards = count(1_700_000_000_000_000_000, -1_000_000_000)
        store = LocalDirectory(root, lambda: next(backwards))
        times = [int(put(store, "k", b"same").split("-")[1]) for _ in range(10)]
        assert all(earlier < later for earlier, later in pairwise(times))

    def test_names_are_listed_in_utf8_order_of_the_whole_key(self, local: LocalDirectory) -> None:
        made = ["a-b", "a/x", "a/y/z", "a/y0", "a0", "a\U0001f600", "b", "a.b/c", "a\uff5e", "Z", "a/y-"]
        for key in made:
            put(local, key, b"1")
        assert keys(local) == sorted(made, key=str.encode)
        assert keys(local, "a/y") == ["a/y-", "a/y/z", "a/y0"]

    def test_a_file_of_a_person_is_an_object_too(self, local: LocalDirectory, root: Path) -> None:
        (root / "drop").mkdir(parents=True)
        (root / "drop" / "day_001.parquet").write_bytes(b"PAR1")
        info = local.head("drop/day_001.parquet")
        assert info is not None
        assert info.metadata == {}
        assert get(local, "drop/day_001.parquet", info.etag) == b"PAR1"
        assert [found.etag for found in local.list("")] == [info.etag]
        put(local, "drop/day_001.parquet", b"PAR2", replace(ANY, expected=info.etag))

    def test_a_change_by_a_person_is_another_version_without_metadata(self, local: LocalDirectory, root: Path) -> None:
        etag = put(local, "k", b"12", Put("text/plain", {"rows": "1"}))
        (root / "k").write_bytes(b"123")
        info = local.head("k")
        assert info is not None
        assert (info.etag == etag, info.metadata) == (False, {})

    def test_the_hidden_folder_is_out_of_reach(self, local: LocalDirectory, root: Path) -> None:
        put(local, "k", b"1")
        assert (root / ".headwater" / "lock").exists()
        assert keys(local) == keys(local, "k") == ["k"]
        assert keys(local, ".headwater/") == keys(local, ".head") == []
        for use in (local.head, local.delete, lambda key: get(local, key), lambda key: put(local, key, b"1")):
            with pytest.raises(Rejected):
                use(".headwater/lock")

    def test_symbolic_links_are_not_followed(self, local: LocalDirectory, root: Path, tmp_path: Path) -> None:
        put(local, "k", b"1")
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "secret").write_bytes(b"secret")
        (root / "folder").symlink_to(outside)
        (root / "file").symlink_to(outside / "secret")
        for key in ("folder/secret", "file"):
            for use in (local.head, local.delete, lambda key: get(local, key), lambda key: put(local, key, b"1")):
                with pytest.raises(Rejected):
                    use(key)
        with pytest.raises(Rejected):
            put(local, "folder/new", b"1")
        assert keys(local) == ["k"]
        assert keys(local, "folder/") == []
        assert [path.name for path in outside.iterdir()] == ["secret"]

    def test_a_root_behind_a_symbolic_link_is_fine(self, root: Path, tmp_path: Path) -> None:
        root.mkdir()
        (tmp_path / "link").symlink_to(root)
        put(LocalDirectory(tmp_path / "link"), "k", b"1")
        assert keys(LocalDirectory(root)) == ["k"]

    def test_a_key_that_is_a_folder_or_below_a_file_is_rejected(self, local: LocalDirectory, root: Path) -> None:
        put(local, "a/b", b"1")
        for key in ("a", "a/b/c"):
            with pytest.raises(Rejected, match="rename one"):
                put(local, key, b"2")
        assert keys(local) == ["a/b"]
        assert list((root / ".headwater" / "tmp").iterdir()) == []

    def test_a_name_too_long_for_the_file_system_is_rejected_and_leaves_nothing(
        self, local: LocalDirectory, root: Path
    ) -> None:
        with pytest.raises(Rejected, match="255"):
            put(local, "a/b/" + "n" * 256, b"1")
        put(local, "n" * 255, b"1")
        assert sorted(path.name for path in root.iterdir()) == [".headwater", "n" * 255]

    def test_a_folder_that_a_killed_writer_left_empty_is_in_nobodys_way(
        self, local: LocalDirectory, root: Path
    ) -> None:
        (root / "a" / "b").mkdir(parents=True)
        put(local, "a/b", b"1", CREATE)
        assert keys(local) == ["a/b"]

    def test_a_fifo_is_no_object_and_hangs_nobody(self, local: LocalDirectory, root: Path) -> None:
        root.mkdir()
        os.mkfifo(root / "pipe")
        assert local.head("pipe") is None
        assert get(local, "pipe") is None
        assert keys(local) == []

    def test_deleting_leaves_no_empty_folder_and_no_metadata(self, local: LocalDirectory, root: Path) -> None:
        put(local, "a/b/c", b"1", Put("text/plain", {"rows": "1", "long": "x" * TOO_LONG}))
        assert len(list((root / ".headwater" / "meta").iterdir())) == 1
        local.delete("a/b/c")
        assert [path.name for path in root.iterdir()] == [".headwater"]
        assert list((root / ".headwater" / "meta").iterdir()) == []

    def test_a_body_that_fails_leaves_the_old_object(self, local: LocalDirectory, root: Path) -> None:
        class Broken(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                raise Transient(f"the other side broke off before {size} bytes")

        put(local, "k", b"old")
        with pytest.raises(Transient, match="broke off"):
            local.put("k", Broken(b"new"), ANY)
        assert get(local, "k") == b"old"
        assert list((root / ".headwater" / "tmp").iterdir()) == []

    def test_an_open_reader_keeps_its_version(self, local: LocalDirectory) -> None:
        put(local, "k", b"old")
        with local.open("k") as stream:
            put(local, "k", b"new")
            local.delete("k")
            assert stream is not None
            assert stream.read() == b"old"
