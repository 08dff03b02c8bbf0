"""What becomes of the items of an hour: told row by row against the file that was there, and added up to a ledger."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from app.core.ledger import Tally
from app.core.windows import Window
from app.dynamo_to_drive.accounts import NAMED_ATTRIBUTES, WOULD_WRITE, WRITTEN, Accounts
from app.dynamo_to_drive.hour_file import COPY_BYTES, FileShape, HourFile, HourWriter, lines_in, read_file
from app.dynamo_to_drive.rows import AttributeValue, Item
from app.dynamo_to_drive.timestamps import NO_ATTRIBUTE, UNREADABLE, TimestampReader
from app.object_store.local import LocalDirectory
from app.object_store.set_aside import MAX_BYTES, SetAsideStore, folder_of
from shipping import START

AT = "datetime_utc"
HOUR = Window(START, START + timedelta(hours=1))
Cells = Mapping[str, str]


def row(second: int, temp: str, **others: str) -> Cells:
    return {AT: f"2026-02-07T12:00:{second:02d}Z", "temp": temp, **others}


@contextmanager
def file_of(rows: Sequence[Cells], held: Sequence[Cells] = ()) -> Iterator[HourFile]:
    writer = HourWriter(FileShape(AT, ("id",), TimestampReader()))
    writer.add_rows(held, held=True)
    writer.add_rows(rows)
    hour = writer.finish()
    writer.close()
    yield hour
    hour.close()


@pytest.mark.parametrize(
    ("held", "new", "same", "corrected"),
    [
        ((), 2, 0, 0),
        ((row(1, "1"), row(2, "2")), 0, 2, 0),
        ((row(1, "1", ph=""), row(2, "3")), 0, 1, 1),
        ((row(0, "9"), row(2, "2")), 1, 1, 0),
        ((row(0, "9"), row(0, "8", id="b"), row(1, "4"), row(3, "5")), 1, 0, 1),
        ((row(2, "2"), row(1, "1")), 0, 2, 0),
    ],
    ids=["none", "the same", "another value", "one that only the file has", "several of them", "out of order"],
)
def test_each_row_is_new_the_same_or_corrected_beside_the_file_that_it_replaces(
    held: Sequence[Cells], new: int, same: int, corrected: int
) -> None:
    with file_of((row(1, "1"), row(2, "2")), held) as hour:
        assert hour.compared == Tally(new=new, already_there=same, corrected=corrected)


def test_rows_that_were_added_twice_are_counted_and_the_later_one_is_kept() -> None:
    with file_of((row(2, "2"), row(1, "1"), row(2, "3"))) as hour:
        assert (hour.rows, hour.repeated) == (2, 1)
        assert [each["temp"] for each in read_file(lines_in(hour.file), escaped=False)] == ["1", "3"]
        assert (hour.min_at, hour.max_at) == (START + timedelta(seconds=1), START + timedelta(seconds=2))


def test_ids_of_text_that_are_equal_as_numbers_are_rows_of_their_own_where_nobody_edited_the_file() -> None:
    """They were written while the table had `id` as its key."""
    held = [{AT: row(1, "")[AT], "name": name} for name in ("010", "1e1", "10")]
    for is_edited, names in ((False, ["010", "10", "1e1"]), (True, ["10"])):
        with closing(HourWriter(FileShape(AT, (), TimestampReader()))) as writer:
            writer.add_rows(held, held=True)
            writer.add_rows(held[-1:])
            with closing(writer.finish(is_edited=is_edited)) as hour:
                assert sorted(each["name"] for each in read_file(lines_in(hour.file), escaped=False)) == names


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"digest": "a", "held_digest": "a"}, Tally(3, 3, already_there=3)),
        ({"digest": "a", "held_digest": "b", "outcome": WRITTEN}, Tally(3, 3, 1, 1, 1)),
        ({"digest": "a", "held_digest": "b", "outcome": WOULD_WRITE}, Tally(3, 3, waiting=3)),
        ({"digest": "a", "held_digest": "b"}, Tally(3, 3, already_there=1, waiting=2)),
        ({"digest": "a", "held_digest": "b", "compared": Tally(new=3)}, Tally(3, 3, waiting=3)),
    ],
    ids=["nothing was to be written", "written", "a dry run", "not written", "not compared"],
)
def test_the_ledger_of_an_hour_closes_whatever_was_done_with_it(told: dict[str, object], expected: Tally) -> None:
    accounts = Accounts(AT)
    accounts.note(HOUR, counted=3, read=3, compared=Tally(new=1, already_there=1, corrected=1))
    accounts.note(HOUR, **told)
    ledger = accounts.closed("table", None)
    assert (ledger.total, ledger.closes, ledger.unit) == (expected, True, "items")


def item(text: str | None = None, **others: str) -> Item:
    named = others if text is None else {AT: text, **others}
    return {name: AttributeValue(S=value) for name, value in named.items()}


def test_an_item_without_an_hour_counts_once_and_names_what_is_wrong_with_it() -> None:
    accounts = Accounts(AT)
    assert (accounts.sample, accounts.all_lack_the_attribute) == ("", False)
    for _ in range(2):
        accounts.unplaced(item(id="1"), UNREADABLE)
    assert (accounts.set_aside, accounts.all_lack_the_attribute, accounts.text) == (1, True, "")
    assert accounts.sample == "attributes id"
    accounts.unplaced(item("yesterday", id="1"), UNREADABLE)
    accounts.unplaced(item("tomorrow", id="1"), UNREADABLE)
    assert (accounts.set_aside, accounts.all_lack_the_attribute, accounts.text) == (3, False, "yesterday")
    assert accounts.sample == f"{AT} = 'yesterday'"
    ledger = accounts.closed("table", None)
    assert {one.reason: one.number for one in ledger.set_aside} == {NO_ATTRIBUTE: 1, UNREADABLE: 2}
    assert (ledger.total, ledger.closes) == (Tally(3, 3, set_aside=3), True)


def test_the_names_that_are_shown_of_many_attributes_are_bounded() -> None:
    accounts = Accounts(AT)
    for number in range(2 * NAMED_ATTRIBUTES):
        accounts.unplaced(item(**{f"name_{number}": "x"}), UNREADABLE)
    assert len(accounts.attributes) == NAMED_ATTRIBUTES
    assert accounts.set_aside == 2 * NAMED_ATTRIBUTES


def test_the_memory_for_items_without_an_hour_is_bounded_and_all_of_them_are_counted() -> None:
    accounts = Accounts(AT, known_items=10)
    for _ in range(2):
        for number in range(30):
            accounts.unplaced(item(id=f"{number}"), UNREADABLE)
    assert accounts.set_aside == 10 + 2 * 20
    assert accounts.closed("table", None).closes


def test_the_furthest_timestamp_more_than_a_day_ahead_is_told() -> None:
    accounts = Accounts(AT, START)
    accounts.placed(START + timedelta(days=1), "in a day")
    assert accounts.ahead == ""
    for days, text in ((3, "in three days"), (5, "in five days"), (4, "in four days")):
        accounts.placed(START + timedelta(days=days), text)
    assert accounts.ahead == "in five days"
    forgetful = Accounts(AT)
    forgetful.placed(START + timedelta(days=9), "in nine days")
    assert forgetful.ahead == ""


def test_a_row_of_a_file_that_the_table_has_in_another_form_is_left_out_and_named() -> None:
    with closing(HourWriter(FileShape(AT, ("id",), TimestampReader()))) as writer:
        saved = {"a": "1.50", "b": "high", "c": "2"}
        writer.add_rows(
            [{AT: "2026-02-07 12:00:01", "id": each, "temp": temp} for each, temp in saved.items()], held=True
        )
        writer.add_rows([row(1, "1.5", id=each) for each in saved])
        with closing(writer.finish(is_edited=True)) as hour:
            rows = list(read_file(lines_in(hour.file), escaped=False))
    assert [each["temp"] for each in rows] == ["1.5", "high", "1.5", "2", "1.5"]
    assert writer.rewritten == ["2026-02-07 12:00:01"]


def drawn(draw: random.Random, key: Sequence[str], *, is_item: bool) -> dict[str, str]:
    """A row: an item of the table, or what a file may have, also from when the table had another key."""
    second = draw.randrange(3)
    text = draw.choice([f"2026-02-07T12:00:{second:02d}Z"] * 3 + [f"2026-02-07 12:00:{second:02d}"])
    made = {AT: text, "v": draw.choice(["1", "1.0", "2", "=x", ""]), "w": draw.choice(["", "", "x"])}
    return made | {name: draw.choice("ab") for name in key if is_item or draw.random() < 0.7}


def filled(row: Cells) -> Cells:
    return {name: text for name, text in row.items() if text}


def says_more(row: Cells, other: Cells) -> bool:
    """Whether a row says anything that another one does not, but for how it writes numbers."""

    def plain(text: str) -> str:
        return "1" if text == "1.0" else text

    return any(text and plain(text) != plain(other.get(name, "")) for name, text in row.items() if name != AT)


@pytest.mark.parametrize("key", [(), ("id",), ("id", "part")], ids=repr)
def test_a_merge_doubles_no_row_of_the_table_and_loses_none_that_only_the_file_has(key: tuple[str, ...]) -> None:
    draw = random.Random(repr(key))  # noqa: S311 - data of a test
    for _ in range(200):
        items = [drawn(draw, key, is_item=True) for _ in range(draw.randrange(5))]
        table = list({tuple(each[name] for name in (AT, *key)): each for each in items}.values())
        held = [drawn(draw, key, is_item=False) for _ in range(draw.randrange(6))]
        is_edited, shape = draw.random() < 0.5, FileShape(AT, key, TimestampReader())
        with closing(HourWriter(shape)) as writer, closing(HourWriter(shape)) as again:
            writer.add_rows(held, held=True)
            writer.add_rows(table)
            with closing(writer.finish(is_edited=is_edited)) as hour:
                rows = [filled(each) for each in read_file(lines_in(hour.file), escaped=False)]
                again.add_rows(read_file(lines_in(hour.file), escaped=False), held=True)
                again.add_rows(table)
                with closing(again.finish()) as second:
                    assert second.digest == hour.digest
                assert hour.compared.new + hour.compared.already_there + hour.compared.corrected == len(table)
        assert all(rows.count(filled(each)) == 1 for each in table)
        for each in held:
            replaced = [one for one in table if all(one.get(name) == each.get(name) for name in (AT, *key))]
            alike = [one for one in table if (is_edited or one[AT] == each[AT]) and not says_more(each, one)]
            assert filled(each) in rows or replaced or alike, (each, table)


def test_a_row_larger_than_a_block_ends_where_its_page_ends() -> None:
    large = "x" * (COPY_BYTES + 1)
    with closing(HourWriter(FileShape(AT, ("id",), TimestampReader()))) as writer:
        writer.add_rows([row(2, large)])
        writer.add_rows([row(1, "1"), row(3, "3")])
        with closing(writer.finish()) as hour:
            rows = [each["temp"] for each in read_file(lines_in(hour.file), escaped=False)]
    assert rows == ["1", large, "3"]


def test_the_text_of_what_was_set_aside_is_bounded_and_all_of_it_is_counted(tmp_path: Path) -> None:
    accounts, store = Accounts(AT), LocalDirectory(tmp_path)
    for number in range(5):
        accounts.unplaced(item(id=f"{number}" * (MAX_BYTES // 3)), UNREADABLE)
    ledger = accounts.closed("table", SetAsideStore(store, folder_of("dynamo_to_drive"), 2 * MAX_BYTES))
    assert [(one.number, one.new) for one in ledger.set_aside] == [(5, 5)]
    (kept,) = store.list("")
    assert MAX_BYTES <= kept.size_bytes < MAX_BYTES * 4 // 3 + 1000
