"""What is set aside is kept once, bounded, and never in the way of a run: on a directory and on a real S3 server."""

import io
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.errors import Permanent, Transient
from app.core.ledger import SetAside
from app.core.runs import Run
from app.object_store.port import ObjectInfo, ObjectStore, PutRequest, check_key
from app.object_store.set_aside import LINES, MAX_BYTES, NDJSON, SetAsideResult, SetAsideStore, folder_of
from memory_objects import MemoryObjects
from object_stores import get, keys, put

FOLDER = "telemetry/_set_aside"
WINDOW = ("D1", "2026-02-07", "export_120000")
REASON = "no device tag"


def kept(aside: SetAsideStore, content: bytes, number: int, content_type: str = LINES) -> SetAsideResult:
    return aside.keep(WINDOW, content, content_type=content_type, reason=REASON, number=number, sample="m v=1 5")


class TestOnEveryStore:
    def test_rows_are_kept_with_their_reason_and_are_all_new_at_first(self, store: ObjectStore) -> None:
        found = kept(SetAsideStore(store, FOLDER), b"m v=1 5\nm v=2 6\n", 2)
        assert found.entry == SetAside(REASON, 2, 2, "m v=1 5")
        assert found.key == f"{FOLDER}/D1/2026-02-07/export_120000.no-device-tag.txt"
        assert get(store, found.key) == b"m v=1 5\nm v=2 6\n"
        info = store.head(found.key)
        assert info is not None
        assert (info.content_type, info.metadata["reason"], info.metadata["number"]) == (LINES, REASON, "2")
        assert "cut" not in info.metadata

    def test_the_same_rows_are_not_new_and_not_written_again_also_by_another_process(self, store: ObjectStore) -> None:
        first = kept(SetAsideStore(store, FOLDER), b"m v=1 5\n", 1)
        written = store.head(first.key)
        second = kept(SetAsideStore(store, FOLDER), b"m v=1 5\n", 1)
        assert second.entry == SetAside(REASON, 1, 0, "m v=1 5")
        assert store.head(first.key) == written

    def test_what_came_later_is_new_and_what_came_before_stays(self, store: ObjectStore) -> None:
        aside = SetAsideStore(store, FOLDER)
        kept(aside, b"a\nb\nc\n", 3)
        assert kept(aside, b"a\nb\nc\nd\n", 4).new == 1
        assert kept(aside, b"d\nc\n", 2).new == 0, "a look at a part of the window"
        assert kept(aside, b"e\n", 1).new == 1, "the others were mended at the source"
        found = kept(aside, b"e\n", 1)
        assert found.new == 0
        assert get(store, found.key) == b"a\nb\nc\nd\ne\n"
        info = store.head(found.key)
        assert info is not None
        assert info.metadata["number"] == "5"

    def test_other_content_is_replaced_as_a_whole(self, store: ObjectStore) -> None:
        aside = SetAsideStore(store, FOLDER)
        assert kept(aside, b"\x00first", 3, "application/octet-stream").new == 3
        assert kept(aside, b"\x00other", 4, "application/octet-stream").new == 1
        assert kept(aside, b"\x00less", 2, "application/octet-stream").new == 0
        assert get(store, kept(aside, b"\x00less", 2, "application/octet-stream").key) == b"\x00less"

    def test_a_sweep_deletes_what_is_old_in_its_folder_and_nothing_else(self, store: ObjectStore) -> None:
        old = kept(SetAsideStore(store, FOLDER), b"a\n", 1)
        others = ["telemetry/_set_aside_too/x.txt", "telemetry/_set_aside.txt", "telemetry/device_id=D1/_set_aside/x"]
        for key in others:
            put(store, key, b"ours")
        assert SetAsideStore(store, FOLDER).sweep(datetime.now(UTC) - timedelta(days=1)) == 0
        assert old.key in keys(store)
        assert SetAsideStore(store, FOLDER).sweep(datetime.now(UTC) + timedelta(days=1)) == 1
        assert sorted(keys(store)) == sorted(others)

    def test_what_a_run_kept_is_found_by_its_time(self, store: ObjectStore) -> None:
        aside = SetAsideStore(store, FOLDER)
        key = kept(aside, b"a\n", 1).key
        run = Run("1", "job", datetime.now(UTC) - timedelta(minutes=1), datetime.now(UTC))
        assert [(each.key, each.size_bytes, f"{FOLDER}/{each.name}") for each in aside.kept_by(run)] == [(key, 2, key)]
        assert aside.kept_by(replace(run, ended_at=None)) == aside.kept_by(run), "one that goes on"
        assert aside.kept_by(replace(run, ended_at=datetime.now(UTC) - timedelta(seconds=30))) == []


class TestSize:
    def test_what_is_beyond_the_limit_is_only_counted(self) -> None:
        store = MemoryObjects()
        found = kept(SetAsideStore(store, FOLDER, 10), b"1234\n5678\n9012\n", 3)
        info = store.head(found.key)
        assert info is not None
        assert (found.new, info.size_bytes, info.metadata["number"], info.metadata["cut"]) == (3, 10, "3", "yes")
        assert kept(SetAsideStore(store, FOLDER, 10), b"1234\n5678\n9012\n", 3).new == 0
        assert kept(SetAsideStore(store, FOLDER, 10), b"1234\n5678\n9012\n3456\n", 4).new == 1
        assert get(store, found.key) == b"1234\n5678\n"

    def test_of_a_line_that_is_larger_than_the_limit_the_beginning_is_kept(self) -> None:
        store = MemoryObjects()
        found = kept(SetAsideStore(store, FOLDER, 10), b"x" * 100, 1)
        assert get(store, found.key) == b"x" * 10

    def test_a_limit_that_was_lowered_cuts_nothing_that_is_kept(self) -> None:
        store = MemoryObjects()
        kept(SetAsideStore(store, FOLDER), b"1234\n5678\n9012\n", 3)
        found = kept(SetAsideStore(store, FOLDER, 10), b"1234\n3456\n", 2)
        assert found.new == 1
        assert get(store, found.key) == b"1234\n5678\n9012\n"

    def test_a_stream_is_read_to_its_end_and_only_its_beginning_is_held(self) -> None:
        store = MemoryObjects()
        aside = SetAsideStore(store, FOLDER, 1024)
        body = b"x" * 5_000_000
        found = aside.keep(
            WINDOW, io.BytesIO(body), content_type="application/octet-stream", reason="hour too large", number=1
        )
        assert get(store, found.key) == body[:1024]
        assert (
            aside.keep(WINDOW, body, content_type="application/octet-stream", reason="hour too large", number=1).new
            == 0
        )


@dataclass
class Failing(MemoryObjects):
    """A store whose writes fail while `error` is set."""

    error: Exception | None = None
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        MemoryObjects.__init__(self)

    def put(self, key: str, body: BinaryIO, put: PutRequest) -> str:
        self.asked.append(key)
        if self.error is not None:
            raise self.error
        return super().put(key, body, put)


class TestFailures:
    @pytest.mark.parametrize("error", [Transient("no answer"), Permanent("access denied")])
    def test_a_store_that_cannot_be_written_is_warned_of_once_and_rows_are_counted(
        self, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        now_seconds = [0.0]
        store = Failing(error=error)
        aside = SetAsideStore(store, FOLDER, MAX_BYTES, lambda: now_seconds[0])
        for _ in range(3):
            found = kept(aside, b"a\n", 1)
            assert (found.key, found.number, found.new, found.entry.sample) == ("", 1, 1, "m v=1 5")
        assert len(store.asked) == 1
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        store.error = None
        now_seconds[0] = 31.0
        found = kept(aside, b"a\n", 1)
        assert (found.new, get(store, found.key)) == (1, b"a\n")

    def test_what_another_process_wrote_meanwhile_is_kept_too(self) -> None:
        @dataclass
        class Raced(Failing):
            def head(self, key: str) -> ObjectInfo | None:
                found = super().head(key)
                if not self.asked:
                    self.asked.append(key)
                    kept(SetAsideStore(self, FOLDER), b"theirs\n", 1)
                return found

        store = Raced()
        found = kept(SetAsideStore(store, FOLDER), b"ours\n", 1)
        assert found.new == 1
        assert get(store, found.key) == b"theirs\nours\n"

    def test_a_folder_of_another_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match="does not end with _set_aside"):
            SetAsideStore(MemoryObjects(), "telemetry")


class TestNames:
    def test_the_folder_lies_below_the_prefix(self) -> None:
        assert folder_of("telemetry") == FOLDER
        assert folder_of("") == "_set_aside"

    @given(st.lists(st.lists(st.text(), min_size=1, max_size=4).map(tuple), min_size=2, max_size=2, unique=True))
    def test_any_names_make_keys_that_every_store_takes_and_that_differ(self, names: list[tuple[str, ...]]) -> None:
        aside = SetAsideStore(MemoryObjects(), FOLDER)
        one, other = (aside.key_of(name, content_type=NDJSON, reason=REASON) for name in names)
        assert one != other
        assert check_key(one).startswith(f"{FOLDER}/")

    @pytest.mark.parametrize("part", ["", ".", "..", "a/b", "%", "~", "ü" * 200, "x" * 500, "\ud800", "\x00\n"])
    def test_a_strange_part_is_one_short_segment(self, part: str) -> None:
        aside = SetAsideStore(MemoryObjects(), FOLDER)
        key = check_key(aside.key_of((part, "hour"), content_type=NDJSON, reason=REASON))
        assert key.isascii()
        assert len(key.split("/")) == 4
        assert max(map(len, key.split("/"))) <= 120

    def test_many_long_parts_make_a_key_of_bounded_length_that_no_other_name_has(self) -> None:
        aside = SetAsideStore(MemoryObjects(), FOLDER)
        one = aside.key_of(("x" * 110,) * 20, content_type=NDJSON, reason="y" * 500)
        other = aside.key_of((*("x" * 110,) * 19, "z"), content_type=NDJSON, reason="y" * 500)
        assert len(check_key(one)) < 700
        assert one != other
