"""Which deltas of older versions are skipped: those whose rows the object of their window says that it holds."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from app.core.windows import Window
from app.object_store.deltas import unfolded_deltas
from app.object_store.port import ObjectInfo

DAY = datetime(2026, 2, 7, tzinfo=UTC)
FOLDER = "telemetry/device_id=D1/date=2026/02/07"


@dataclass
class Store:
    """Objects by key, and what was asked of them."""

    objects: dict[str, ObjectInfo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def put(self, window: Window, part: int = 0, folded: int | None = None, *, noted: bool = True) -> str:
        named_at = window.start + timedelta(seconds=part)
        key = f"{FOLDER}/export_{named_at:%H%M%S}.parquet"
        metadata = {"window": str(window)} if noted else {}
        if folded is not None:
            metadata["folded"] = str(folded)
        self.objects[key] = ObjectInfo(key, 1, f"e{len(self.objects)}", DAY, metadata=metadata)
        return key

    def listing(self) -> list[ObjectInfo]:
        return [ObjectInfo(each.key, 1, each.etag, DAY) for each in self.objects.values()]

    def head(self, one: ObjectInfo | str) -> ObjectInfo | None:
        key = one if isinstance(one, str) else one.key
        self.asked.append(key)
        return self.objects.get(key)

    def left(self, infos: Iterable[ObjectInfo] | None = None, *, window_seconds: int = 60) -> list[str]:
        found = unfolded_deltas(self.listing() if infos is None else infos, self.head, window_seconds=window_seconds)
        return [info.key for info in found.infos]


def cell(number: int, seconds: int = 3600) -> Window:
    start = DAY + timedelta(seconds=number * seconds)
    return Window(start, start + timedelta(seconds=seconds))


def test_only_objects_of_windows_that_have_both_are_asked() -> None:
    store = Store()
    for number in range(24):
        store.put(cell(number), folded=7)
    assert (len(store.left()), store.asked) == (24, [])
    delta = store.put(cell(3), 1)
    assert delta not in store.left()
    assert store.asked == [f"{FOLDER}/export_030000.parquet"]


def test_an_object_that_was_asked_has_the_version_that_it_had_then() -> None:
    store = Store()
    key = store.put(cell(3), folded=1)
    store.put(cell(3), 1)
    before = [ObjectInfo(each.key, 1, "before", DAY) for each in store.listing()]
    found = unfolded_deltas(before, store.head)
    assert [(info.key, info.etag) for info in found.infos] == [(key, store.objects[key].etag)]


def test_a_delta_without_its_object_beside_it_is_looked_up_and_the_listing_is_not_whole() -> None:
    store = Store()
    base, one, two = store.put(cell(3), folded=1), store.put(cell(3), 1), store.put(cell(3), 2)
    part = [info for info in store.listing() if info.key != base]
    found = unfolded_deltas(part, store.head)
    assert ([info.key for info in found.infos], found.is_whole) == ([two], False)
    assert store.asked == [one, base]
    del store.objects[base]
    assert store.left(part) == [one, two]
    assert unfolded_deltas(store.listing(), store.head).infos != []


def test_what_no_headwater_noted_folds_nothing() -> None:
    store = Store()
    kept = [store.put(cell(3), folded=9, noted=False), store.put(cell(3), 1), store.put(cell(5), 1, noted=False)]
    assert store.left() == kept
    store.put(cell(3), folded=9)
    store.objects[f"{FOLDER}/export_040000.parquet"] = ObjectInfo(
        f"{FOLDER}/export_040000.parquet", 1, "copy", DAY, metadata={"window": str(cell(3)), "folded": "9"}
    )
    delta = store.put(cell(4), 1)
    assert delta in store.left()


@given(
    seconds=st.sampled_from([60, 90, 96, 600, 3600, 86_400]),
    deltas=st.sets(st.tuples(st.integers(0, 5), st.integers(1, 200)), max_size=12),
    folded=st.dictionaries(st.integers(0, 5), st.integers(0, 200)),
    missing=st.sets(st.integers(0, 5), max_size=2),
    knows_length=st.booleans(),
)
def test_exactly_those_at_or_below_the_number_are_skipped(
    *,
    seconds: int,
    deltas: set[tuple[int, int]],
    folded: dict[int, int],
    missing: set[int],
    knows_length: bool,
) -> None:
    store, expected = Store(), set()
    cells = [cell(number, seconds) for number in range(min(6, 86_400 // seconds))]
    for number, window in enumerate(cells):
        if number not in missing:
            expected.add(store.put(window, folded=folded.get(number)))
    for number, part in deltas:
        # A part that lies on a minute is told from a window only beside others of its window that do not.
        if number >= len(cells) or part >= seconds or (part % 60 == 0 and (number, 1) not in deltas):
            continue
        key = store.put(cells[number], part)
        if number in missing or part > folded.get(number, 0):
            expected.add(key)
    assert set(store.left(window_seconds=seconds if knows_length else 60)) == expected
