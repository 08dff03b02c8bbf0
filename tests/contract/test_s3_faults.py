"""What the S3 store makes of a network and a server that fail: the right answer, or our own error in bounded time."""

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import pytest

from app.core.errors import AppError, Conflict, Transient
from app.object_store.port import PutRequest
from app.object_store.s3 import S3Store
from app.object_store.s3_client import S3Target
from fault_proxy import (
    Fault,
    FaultProxy,
    answer,
    answer_afterwards,
    black_hole,
    cut_request,
    lose_answer,
    reset,
    truncate,
)
from object_stores import ANY, CREATE, get, keys, put, s3_store


@pytest.fixture(scope="module")
def hasty(shared_target: S3Target) -> Iterator[S3Store]:
    with s3_store(replace(shared_target, attempts=1, read_timeout_seconds=0.05)) as store:
        yield store


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
            put(remote, "k", b"1", PutRequest("text/plain", {"digest": "ours"}, ""))
        info = remote.head("k")
        assert info is not None
        assert info.metadata == {"digest": "ours"}

    def test_a_put_that_was_stored_and_answered_500_is_a_conflict_too(self, remote: S3Store, proxy: FaultProxy) -> None:
        etag = put(remote, "k", b"1")
        proxy.add(answer_afterwards(500), "PUT")
        with pytest.raises(Conflict):
            put(remote, "k", b"2", PutRequest("text/plain", {"digest": "ours"}, etag))
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
        with pytest.raises(Transient, match="interrupted 9 times"):
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
            with pytest.raises(Transient, match="not those stored"):
                get(store, "k", etag)
