"""What every object store promises, on a directory and on a real S3 server."""

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from app.core.errors import Conflict, Rejected
from app.object_store.port import ObjectStore, PutRequest
from object_stores import ANY, CREATE, get, keys, put

if TYPE_CHECKING:
    from collections.abc import Callable

STRANGE_KEYS = (
    "device_id=ü 1/date=2026/02/07/export_120000.parquet",
    "a b/100%.csv",
    "a+b/c?d#e&f.txt",
    "日本語/😀.txt",
    "quote'\"<x>/~tilde!*().txt",
    "a%20b/%2e%2e.txt",
)
BAD_KEYS = ("", "/a", "a/", "a//b", "a/../b", "./a", "..", "a\nb", "a\x00b", "a\x7f", "k" * 1025, "ü" * 513, "a\ud800b")


class TestEveryStore:
    @pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_001])
    def test_bytes_come_back_as_they_were(self, store: ObjectStore, size: int) -> None:
        data = os.urandom(size)
        etag = put(store, "a/b.bin", data)
        assert get(store, "a/b.bin") == data
        assert get(store, "a/b.bin", etag) == data

    def test_properties_and_metadata_come_back(self, store: ObjectStore) -> None:
        metadata = {"Rows": "12", "digest": "a b=c/ü".encode().hex(), "app-version": "1.0 (x; y)"}
        etag = put(store, "a/b", b"12345", PutRequest("application/vnd.apache.parquet", metadata))
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
        first = put(store, "k", b"first", PutRequest("text/plain", {"rows": "1"}))
        second = put(store, "k", b"second", PutRequest("text/csv", {"sum": "2"}, first))
        info = store.head("k")
        assert info is not None
        assert (info.etag, info.content_type, info.metadata) == (second, "text/csv", {"sum": "2"})
        assert get(store, "k") == b"second"

    def test_a_put_with_a_stale_etag_changes_nothing(self, store: ObjectStore) -> None:
        stale = put(store, "k", b"one", PutRequest("text/plain", {"rows": "1"}))
        put(store, "k", b"two", PutRequest("text/plain", {"rows": "2"}))
        before = store.head("k")
        with pytest.raises(Conflict):
            put(store, "k", b"three", PutRequest("text/csv", {"rows": "3"}, stale))
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

    @pytest.mark.slow
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
