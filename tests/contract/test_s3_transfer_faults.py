"""What networks and stores do wrong while an object is sent in parts or patched: right, or a clear error."""

import re
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient
from app.object_store.port import ListingRequest, PutRequest
from app.object_store.s3_multipart import abort_stale_uploads
from contract.test_transfers import ANY, MIB, SIXTEEN, Both, Trickle, opened, parts_left, target_of
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

pytestmark = pytest.mark.slow

SLOW_DOWN = answer(503, b"<Error><Code>SlowDown</Code></Error>", {"Retry-After": "3"})
LATE_ERROR = answer(200, b"<Error><Code>InternalError</Code><Message>m</Message></Error>")


@pytest.fixture(scope="module")
def bucket(seaweed: Seaweed) -> str:
    return seaweed.new_bucket()


@pytest.fixture(scope="module")
def outside(seaweed: Seaweed) -> Iterator[Any]:
    with closing(seaweed.client()) as client:
        yield client


@pytest.fixture(scope="module")
def shared_proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.host, seaweed.port) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy, outside: Any, bucket: str) -> Iterator[FaultProxy]:
    shared_proxy.clear()
    shared_proxy.seen.clear()
    for found in outside.list_objects_v2(Bucket=bucket).get("Contents", ()):
        outside.delete_object(Bucket=bucket, Key=found["Key"])
    yield shared_proxy
    shared_proxy.clear()


@pytest.fixture(scope="module")
def shared_remote(seaweed: Seaweed, shared_proxy: FaultProxy, bucket: str) -> Iterator[Both]:
    target = replace(target_of(seaweed, bucket, shared_proxy.url), read_timeout_seconds=5.0)
    yield from opened(target)


@pytest.fixture
def remote(shared_remote: Both, proxy: FaultProxy) -> Both:
    assert proxy.url
    return shared_remote


def part(request: Request) -> bool:
    return request.method == "PUT" and "partNumber=" in request.path


def complete(request: Request) -> bool:
    return request.method == "POST" and "uploadId=" in request.path


def single(request: Request) -> bool:
    return request.method == "PUT" and "partNumber=" not in request.path


@pytest.mark.parametrize(
    "met",
    [
        (reset(), part),
        (cut_request(1_000_000), part),
        (lose_answer(), part),
        (answer(500), part),
        (lose_answer(), complete),
        (answer_afterwards(500), complete),
        (LATE_ERROR, complete),
        (SLOW_DOWN, complete),
    ],
    ids=lambda met: f"{met[0].name} {met[1].__name__}",
)
def test_one_fault_of_an_upload_in_parts_is_got_over(
    remote: Both, proxy: FaultProxy, outside: Any, bucket: str, met: tuple[Fault, Callable[[Request], bool]]
) -> None:
    fault, fits = met
    proxy.add(fault, fits=fits)
    done = remote.write("k", SIXTEEN[: 9 * MIB], PutRequest("text/plain", {"rows": "1"}, ""))
    held = remote.held("k")
    assert (held.etag, held.size_bytes, held.metadata["rows"]) == (done.etag, 9 * MIB, "1")
    assert remote.read("k") == SIXTEEN[: 9 * MIB]
    assert parts_left(outside, bucket) == []


@pytest.mark.parametrize("fault", [lose_answer(), answer_afterwards(500)], ids=lambda fault: fault.name)
def test_our_own_small_write_whose_answer_was_lost_is_no_conflict(
    remote: Both, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.add(fault, fits=single)
    first = remote.write("k", b"12345", PutRequest("text/plain", expected=""))
    proxy.add(fault, fits=single)
    second = remote.transfers.patch(remote.held("k"), 5, Trickle(b"6"))
    assert (remote.held("k").etag, remote.read("k")) == (second.etag, b"123456")
    assert first.etag != second.etag


@pytest.mark.parametrize("fault", [lose_answer(), answer_afterwards(500)], ids=lambda fault: fault.name)
def test_our_own_large_patch_whose_answer_was_lost_is_no_conflict(
    remote: Both, proxy: FaultProxy, fault: Fault
) -> None:
    remote.write("k", SIXTEEN)
    proxy.add(fault, fits=complete)
    done = remote.transfers.patch(remote.held("k"), 9 * MIB, Trickle(b"x"))
    assert remote.held("k").etag == done.etag
    assert remote.read("k") == SIXTEEN[: 9 * MIB] + b"x" + SIXTEEN[9 * MIB + 1 :]


@pytest.mark.slow
def test_a_store_that_stays_busy_is_transient_and_leaves_no_parts(
    remote: Both, proxy: FaultProxy, outside: Any, bucket: str
) -> None:
    remote.write("k", b"old")
    for fits in (part, complete):
        proxy.add(SLOW_DOWN, fits=fits, times=100)
        with pytest.raises(Transient):
            remote.write("k", SIXTEEN)
        proxy.clear()
    assert remote.read("k") == b"old"
    assert parts_left(outside, bucket) == []


def test_a_write_that_comes_between_look_and_complete_is_a_conflict(remote: Both) -> None:
    remote.write("k", SIXTEEN)
    held = remote.held("k")

    class Interrupted(Trickle):
        def read(self, count: int, /) -> bytes:
            data = super().read(count)
            if not data:
                remote.write("k", b"somebody else's")
            return data

    with pytest.raises(Conflict):
        remote.transfers.patch(held, 16 * MIB, Interrupted(b"mine"))
    assert remote.read("k") == b"somebody else's"


def test_all_parts_of_a_patch_but_the_last_are_alike(remote: Both, proxy: FaultProxy) -> None:
    sizes: dict[str, int] = {}

    def note(request: Request) -> bool:
        if request.method == "PUT" and "partNumber=" in request.path:
            first, _, last = request.headers.get("x-amz-copy-source-range", "").removeprefix("bytes=").partition("-")
            count = int(last) - int(first) + 1 if last else int(request.headers["content-length"])
            sizes[re.findall(r"partNumber=(\d+)", request.path)[0]] = count
        return False

    data = SIXTEEN + SIXTEEN[: MIB + 3]
    remote.write("k", data)
    proxy.add(answer(500), fits=note, times=100)
    for offset, new in ((9 * MIB + 5, b"x"), (0, b"front"), (len(data), SIXTEEN[: 9 * MIB]), (26 * MIB, b"at the end")):
        sizes.clear()
        remote.transfers.patch(remote.held("k"), offset, Trickle(new))
        data = data[:offset] + new + data[offset + len(new) :]
        assert remote.read("k") == data
        *alike, last = [sizes[number] for number in sorted(sizes, key=int)]
        assert set(alike) == {8 * MIB}
        assert last <= 8 * MIB
        assert sum(alike) + last == len(data)


@pytest.mark.slow
def test_a_store_that_cannot_copy_parts_is_sent_them(remote: Both, proxy: FaultProxy, seaweed: Seaweed) -> None:
    unable = answer(501, b"<Error><Code>NotImplemented</Code></Error>")
    bucket = remote.store.target.bucket  # type: ignore[attr-defined]
    for fresh in opened(target_of(seaweed, bucket, proxy.url)):
        fresh.write("k", SIXTEEN)
        proxy.add(unable, fits=lambda request: "x-amz-copy-source" in request.headers, times=100)
        for offset, new in ((9 * MIB, b"middle"), (0, b"front")):
            before = fresh.read("k") or b""
            fresh.transfers.patch(fresh.held("k"), offset, Trickle(new))
            assert fresh.read("k") == before[:offset] + new + before[offset + len(new) :]


@pytest.mark.slow
@pytest.mark.parametrize("at_complete_only", [True, False])
def test_a_store_without_conditions_is_found_out_and_patches_say_so(
    remote: Both, proxy: FaultProxy, seaweed: Seaweed, *, at_complete_only: bool
) -> None:
    """Such a store answers a wrong condition as if it had been right."""
    bucket = remote.store.target.bucket  # type: ignore[attr-defined]
    headers = {"ETag": '"any"', "Content-Type": "application/xml"}
    taken = answer_afterwards(200, b"<R><ETag>&quot;any&quot;</ETag></R>", headers)

    def ignored(request: Request) -> bool:
        conditional = not {"if-match", "if-none-match"}.isdisjoint(request.headers)
        return conditional and (complete(request) or (single(request) and not at_complete_only))

    proxy.add(taken, fits=ignored, times=1000)
    for fresh in opened(target_of(seaweed, bucket, proxy.url)):
        fresh.write("k", SIXTEEN)
        done = fresh.transfers.patch(fresh.held("k"), 9 * MIB, Trickle(b"x"))
        assert not done.guarded
        assert fresh.read("k") == SIXTEEN[: 9 * MIB] + b"x" + SIXTEEN[9 * MIB + 1 :]
        fresh.write("small", b"12")
        held = fresh.held("small")
        assert fresh.transfers.patch(held, 1, Trickle(b"3")).guarded == at_complete_only
        with pytest.raises(Conflict):
            fresh.transfers.patch(held, 1, Trickle(b"4"))


def test_a_broken_download_of_a_span_is_resumed_inside_it(remote: Both, proxy: FaultProxy) -> None:
    remote.write("k", SIXTEEN[: 2 * MIB])
    held = remote.held("k")
    for after_bytes in (0, 1, 300_000):
        proxy.add(truncate(after_bytes), "GET")
    assert remote.span(held, 1000, MIB) == SIXTEEN[1000 : 1000 + MIB]
    ranges = [seen.headers["range"] for seen in proxy.seen if "range" in seen.headers]
    assert ranges == [f"bytes={first}-{1000 + MIB - 1}" for first in (1000, 1000, 1001, 301_001)]


def test_what_killed_uploads_left_is_swept_when_it_is_old_and_ours(remote: Both, outside: Any, bucket: str) -> None:
    for key in ("ours/a", "ours/b", "theirs/c"):
        upload = outside.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        outside.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"1")
    store: Any = remote.store
    now = datetime.now(UTC)
    try:
        assert abort_stale_uploads(store, now - timedelta(hours=1), lambda _: True) == 0
        assert abort_stale_uploads(store, now + timedelta(hours=1), lambda key: key.startswith("ours/")) == 2
        assert [key for key in parts_left(outside, bucket) if "/.headwater" not in key] == ["theirs/c"]
    finally:
        abort_stale_uploads(store, now + timedelta(hours=1), lambda _: True)


def test_a_key_that_may_not_sweep_is_told_what_it_lacks(remote: Both, proxy: FaultProxy) -> None:
    proxy.add(answer(403, b"<Error><Code>AccessDenied</Code></Error>"), "GET", "*uploads*", times=10)
    store: Any = remote.store
    with pytest.raises(Permanent) as caught:
        abort_stale_uploads(store, datetime.now(UTC), lambda _: True)
    assert "s3:ListBucketMultipartUploads" in caught.value.hint


def test_a_continuation_that_is_none_is_rejected(remote: Both, proxy: FaultProxy) -> None:
    proxy.add(answer(400, b"<Error><Code>InvalidArgument</Code></Error>"), "GET")
    with pytest.raises(Rejected):
        remote.transfers.page(ListingRequest(continuation="nonsense"))


@pytest.mark.parametrize(
    "fault",
    [
        answer(200, b"<html>a login page</html>", {"Content-Type": "text/html"}),
        LATE_ERROR,
        answer(403, b"<Error><Code>AccessDenied</Code></Error>"),
        answer(404, b"<Error><Code>NoSuchUpload</Code></Error>"),
        answer(404, b"not found"),
        answer(501, b"<Error><Code>NotImplemented</Code></Error>"),
        reset(),
        black_hole(),
    ],
    ids=lambda fault: f"{fault.name} {fault.instead and fault.instead.status}",
)
@pytest.mark.slow
def test_no_foreign_exception_escapes_and_nothing_is_called_missing(
    remote: Both, proxy: FaultProxy, seaweed: Seaweed, fault: Fault
) -> None:
    bucket = remote.store.target.bucket  # type: ignore[attr-defined]
    target = replace(target_of(seaweed, bucket, proxy.url), attempts=1, read_timeout_seconds=1.0)
    remote.write("k", SIXTEEN)
    held = remote.held("k")
    with closing(opened(target)) as lasting:
        fresh = next(lasting)
        proxy.add(fault, times=1000)
        uses: tuple[Callable[[], object], ...] = (
            lambda: fresh.write("k", SIXTEEN),
            lambda: fresh.write("k", b"1", replace(ANY, expected="")),
            lambda: fresh.transfers.patch(held, 9 * MIB, Trickle(b"x")),
            lambda: fresh.span(held, 5, 10),
            lambda: fresh.transfers.page(ListingRequest()),
        )
        for use in uses:
            with suppress(AppError):
                use()
                pytest.fail("a fault was taken for success")
        proxy.clear()
    assert remote.read("k") == SIXTEEN
