"""What the second half of the object store port promises, in memory, on a directory and on a real S3 server."""

import os
import random
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.core.errors import Conflict, Rejected, Transient
from app.object_store.local import LocalDirectory
from app.object_store.port import MARK, ListingRequest, ObjectInfo, ObjectStore, PutRequest, StoredObject, Transfers
from app.object_store.s3 import S3Store
from app.object_store.s3_client import S3Target
from app.object_store.s3_multipart import S3Transfers, UploadPool, part_bytes
from memory_objects import MemoryObjects
from seaweed import Seaweed

MIB = 1 << 20
ANY = PutRequest("text/plain")
WRONG = '"00000000000000000000000000000000"'
SIXTEEN = os.urandom(16 * MIB)


class Trickle:
    """A body that comes in pieces of its own choice and cannot be sought in."""

    def __init__(self, data: bytes, seed: int = 0, *, breaks_at: int | None = None) -> None:
        self._data, self._draw, self._breaks_at = data, random.Random(seed), breaks_at  # noqa: S311
        self._position = 0

    def read(self, count: int, /) -> bytes:
        if self._breaks_at is not None and self._position >= self._breaks_at:
            raise Transient("the client went away")
        piece = self._data[self._position : self._position + self._draw.randint(1, count)]
        self._position += len(piece)
        return piece


@dataclass(frozen=True)
class Both:
    """Both halves over the same objects."""

    store: ObjectStore
    transfers: Transfers

    def write(self, key: str, data: bytes, put: PutRequest = ANY) -> StoredObject:
        return self.transfers.write(key, Trickle(data), put)

    def held(self, key: str) -> ObjectInfo:
        info = self.store.head(key)
        assert info is not None
        return info

    def read(self, key: str) -> bytes | None:
        with self.store.open(key) as stream:
            return None if stream is None else stream.read()

    def span(self, held: ObjectInfo, first: int, count: int) -> bytes:
        with self.transfers.open_span(held, first, count) as stream:
            return b"".join(iter(lambda: stream.read(1 << 16), b""))


def target_of(seaweed: Seaweed, bucket: str, url: str = "") -> S3Target:
    return S3Target(
        bucket=bucket,
        endpoint_url=url or seaweed.endpoint_url,
        addressing_style="path",
        access_key_id=seaweed.access_key,
        secret_access_key=seaweed.secret_key,
    )


@pytest.fixture(scope="module")
def bucket(seaweed: Seaweed) -> str:
    return seaweed.new_bucket()


@pytest.fixture(scope="module")
def outside(seaweed: Seaweed) -> Iterator[Any]:
    with closing(seaweed.client()) as client:
        yield client


def opened(target: S3Target) -> Generator[Both]:
    with closing(S3Store(target, "telemetry/.headwater-probe/test")) as store:
        store.probe()
        with closing(S3Transfers(store)) as transfers:
            yield Both(store, transfers)


@pytest.fixture(scope="module")
def shared_s3(seaweed: Seaweed, bucket: str) -> Iterator[Both]:
    yield from opened(target_of(seaweed, bucket))


@pytest.fixture
def s3(shared_s3: Both) -> Both:
    for info in list(shared_s3.store.list("")):
        shared_s3.store.delete(info.key)
    return shared_s3


@pytest.fixture(params=["memory", "local directory", "s3"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Both:
    if request.param == "memory":
        memory = MemoryObjects()
        return Both(memory, memory)
    if request.param == "local directory":
        local = LocalDirectory(tmp_path / "objects")
        local.probe()
        return Both(local, local)
    remote: Both = request.getfixturevalue("s3")
    return remote


def parts_left(outside: Any, bucket: str) -> list[str]:
    return [upload["Key"] for upload in outside.list_multipart_uploads(Bucket=bucket).get("Uploads", ())]


Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "patch", "patch", "delete"]), st.integers(0, 1000), st.integers(0, 300)),
    max_size=8,
)


def play(both: Both, key: str, steps: list[Step], scale: int) -> None:
    """`steps` on the store and on a bytearray: an offset is per mille of the size, a length is scaled."""
    model: bytearray | None = None
    for number, (what, place, length) in enumerate(steps):
        data = SIXTEEN[number : number + length * scale] if length * scale <= 8 * MIB else SIXTEEN[: length * scale]
        if what == "write":
            done = both.write(key, data)
            model = bytearray(data)
        elif what == "delete":
            both.store.delete(key)
            model = None
            continue
        elif model is not None:
            offset = len(model) * place // 1000
            done = both.transfers.patch(both.held(key), offset, Trickle(data, number))
            model[offset : offset + len(data)] = data
        else:
            continue
        held = both.held(key)
        assert (done.etag, done.size_bytes, done.guarded) == (held.etag, len(model), True)
        assert held.content_type == "text/plain"
    assert both.read(key) == (None if model is None else bytes(model))


class TestEveryStore:
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(steps=STEPS)
    def test_any_sequence_of_changes_is_the_one_on_a_bytearray(self, both: Both, steps: list[Step]) -> None:
        both.store.delete("k")
        play(both, "k", steps, 7)

    @pytest.mark.slow
    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(steps=STEPS)
    def test_any_sequence_of_large_changes_is_the_one_on_a_bytearray(self, both: Both, steps: list[Step]) -> None:
        both.store.delete("k")
        play(both, "k", [("write", 0, 300), *steps], 50_000)

    def test_a_body_larger_than_a_part_comes_back(self, both: Both) -> None:
        for size in (8 * MIB - 1, 8 * MIB, 8 * MIB + 1):
            data = SIXTEEN[:size]
            done = both.write("a b/large+ü", data)
            held = both.held("a b/large+ü")
            assert (done.size_bytes, held.size_bytes, held.etag) == (size, size, done.etag)
            assert both.read("a b/large+ü") == data

    def test_a_patch_keeps_type_metadata_and_what_it_does_not_overwrite(self, both: Both) -> None:
        both.write("k", SIXTEEN, PutRequest("text/csv", {"rows": "7"}))
        for offset, new in ((9 * MIB, b"x"), (0, b"first"), (16 * MIB - 2, b"grown"), (1, b"")):
            before = both.read("k")
            both.transfers.patch(both.held("k"), offset, Trickle(new))
            held, after = both.held("k"), both.read("k")
            assert before is not None
            assert after == before[:offset] + new + before[offset + len(new) :]
            assert held.content_type == "text/csv"
            assert {name: value for name, value in held.metadata.items() if name != MARK} == {"rows": "7"}

    def test_of_two_patches_at_once_one_wins_and_nothing_is_mixed(self, both: Both) -> None:
        for size in (1000, 9 * MIB):
            original = both.write("race", bytes(size))
            held, start = both.held("race"), threading.Barrier(2)

            def change(new: bytes, held: ObjectInfo = held, start: threading.Barrier = start) -> StoredObject | None:
                start.wait(20)
                with suppress(Conflict):
                    return both.transfers.patch(held, 10, Trickle(new))
                return None

            with ThreadPoolExecutor(2) as pool:
                done = list(pool.map(change, (b"a" * 50, b"b" * 90)))
            assert sum(each is not None for each in done) == 1
            new = b"a" * 50 if done[0] else b"b" * 90
            assert both.read("race") == bytes(10) + new + bytes(size - 10 - len(new))
            assert both.held("race").etag != original.etag

    def test_a_patch_of_a_version_that_is_gone_is_a_conflict_and_changes_nothing(self, both: Both) -> None:
        for size in (1000, 9 * MIB):
            both.write("k", bytes(size))
            stale = both.held("k")
            newer = both.write("k", b"1" * size)
            with pytest.raises(Conflict):
                both.transfers.patch(stale, 5, Trickle(b"x"))
            assert both.held("k").etag == newer.etag
            both.store.delete("k")
            with pytest.raises(Conflict):
                both.transfers.patch(stale, 5, Trickle(b"x"))
            assert both.store.head("k") is None

    def test_conditions_hold_for_bodies_of_any_size(self, both: Both) -> None:
        for data in (b"small", SIXTEEN):
            both.store.delete("k")
            first = both.write("k", data, replace(ANY, expected=""))
            with pytest.raises(Conflict):
                both.write("k", data, replace(ANY, expected=""))
            with pytest.raises(Conflict):
                both.write("k", b"new" + data, replace(ANY, expected=WRONG))
            assert both.held("k").etag == first.etag
            second = both.write("k", data + b"2", replace(ANY, expected=first.etag))
            assert (both.held("k").etag, second.guarded) == (second.etag, True)

    @pytest.mark.parametrize("size", [100, 9 * MIB, 16 * MIB])
    def test_a_body_that_breaks_off_changes_nothing(self, both: Both, outside: Any, bucket: str, size: int) -> None:
        both.write("k", b"old")
        with pytest.raises(Transient, match="went away"):
            both.transfers.write("k", Trickle(SIXTEEN[:size], breaks_at=size - 50), ANY)
        with pytest.raises(Transient, match="went away"):
            both.transfers.patch(both.held("k"), 2, Trickle(SIXTEEN[:size], breaks_at=size - 50))
        assert both.read("k") == b"old"
        assert parts_left(outside, bucket) == []

    def test_spans_are_of_one_version(self, both: Both) -> None:
        data = SIXTEEN[: 3 * MIB]
        both.write("k", data)
        held = both.held("k")
        for first, count in ((0, 1), (0, 3 * MIB), (MIB - 1, MIB + 2), (3 * MIB - 1, 1)):
            assert both.span(held, first, count) == data[first : first + count]
        both.write("k", data[::-1])
        with pytest.raises(Conflict):
            both.span(held, 1, 1)
        both.store.delete("k")
        with pytest.raises(Conflict):
            both.span(held, 1, 1)
        both.write("empty", b"")
        assert both.span(both.held("empty"), 0, 0) == b""

    @pytest.mark.parametrize("delimiter", ["", "/"])
    @pytest.mark.parametrize("limit", [1, 3, 1000])
    def test_pages_put_together_are_the_listing(self, both: Both, delimiter: str, limit: int) -> None:
        keys = [f"p/{name}" for name in ("a", "b/1", "b/2", "b/c/3", "c-d/4", "c-e", "c/5", "z", "é/6")]
        for key in keys:
            both.write(key, key.encode())
        for prefix in ("p/", "p/b/", "p/c", "nothing/"):
            objects: list[str] = []
            prefixes: list[str] = []
            continuation = ""
            while True:
                page = both.transfers.page(ListingRequest(prefix, delimiter, limit, continuation))
                assert len(page.objects) + len(page.prefixes) <= limit
                objects += [info.key for info in page.objects]
                prefixes += page.prefixes
                continuation = page.continuation
                if not continuation:
                    break
            rolled = [key for key in keys if key.startswith(prefix)]
            tails = {key: key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "") for key in rolled}
            assert sorted(objects) == [key for key in rolled if not tails[key][1]]  # SeaweedFS sorts a slash first
            assert sorted(prefixes) == sorted({prefix + head + tail for head, tail, _ in tails.values() if tail})

    def test_a_folder_whose_objects_were_deleted_is_no_object(self, both: Both) -> None:
        both.write("p/q/1", b"1")
        both.store.delete("p/q/1")
        for prefix in ("p/", "p/q/"):
            for delimiter in ("", "/"):
                assert both.transfers.page(ListingRequest(prefix, delimiter)).objects == []

    def test_keys_that_stores_would_rewrite_are_rejected(self, both: Both) -> None:
        for key in ("", "/a", "a//b", "a/../b", "a\nb", "k" * 1025, "a\ud800b"):
            with pytest.raises((Rejected, UnicodeEncodeError)):
                both.write(key, b"1")
        assert both.transfers.page(ListingRequest()).objects == []


def test_an_upload_for_which_no_place_becomes_free_is_refused_and_the_places_of_others_stay_theirs() -> None:
    with closing(UploadPool(at_once=1, large_at_once=2, wait_seconds=0.01)) as desk:
        for _ in range(2):
            with desk.place(), desk.place():
                with pytest.raises(Transient, match="too many large uploads"), desk.place():
                    pass
                with suppress(Transient), desk.place():
                    pass
            with desk.place():
                pass


@pytest.mark.parametrize(
    ("number", "size_bytes"), [(1, 8), (4_000, 8), (4_001, 16), (7_000, 16), (7_001, 32), (10_000, 32)]
)
def test_parts_grow_so_that_ten_thousand_of_them_hold_the_largest_object(number: int, size_bytes: int) -> None:
    assert part_bytes(number) == size_bytes * MIB


def test_there_is_no_part_beyond_ten_thousand() -> None:
    with pytest.raises(Rejected, match=r"10,000 parts"):
        part_bytes(10_001)
