"""Every writing of an instant is read as that instant, sorts as it, and is found in the ranges of its hour."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.windows import EPOCH, Window, window_at
from app.dynamo_to_drive.timestamps import (
    EVERY_TRAIT,
    MAX_NUMBER_CHARACTERS,
    OUTSIDE,
    UNREADABLE,
    HourTexts,
    TextTrait,
    TimestampReader,
    ascend,
    is_found,
    number_ranges,
    text_ranges,
    unit_of,
)
from effort import EFFORT

UNITS = {"s": 0, "ms": 3, "us": 6}
HOUR = Window(datetime(2026, 2, 7, 12, tzinfo=UTC), datetime(2026, 2, 7, 13, tzinfo=UTC))

instants = st.integers(0, 6 * 10**15).map(
    lambda passed: datetime(2002, 1, 1, tzinfo=UTC) + timedelta(microseconds=passed)
)
zones = st.integers(-56, 56).map(lambda quarters: timezone(timedelta(minutes=15 * quarters)))
# Digits that DynamoDB keeps and a microsecond does not.
below = st.sampled_from(["", "0", "000", "123", "999999999"])


def number_of(at: datetime, unit: str, more: str) -> str:
    """The instant as a number, with more digits than microseconds have."""
    passed = (at - EPOCH) // timedelta(microseconds=1)
    whole, rest = divmod(passed, 10 ** (6 - UNITS[unit]))
    digits = f"{rest:0{6 - UNITS[unit]}d}" if unit != "us" else ""
    return f"{whole}.{digits}{more}".rstrip(".")


@st.composite
def texts(draw: st.DrawFn, at: datetime) -> str:
    """One of the writings of an instant that a program or a person may have chosen."""
    more = draw(below)
    if draw(st.integers(0, 3)) == 0:
        return number_of(at, draw(st.sampled_from(sorted(UNITS))), more)
    zone = draw(st.sampled_from([UTC, UTC, None]) | zones)
    local = at.astimezone(zone or UTC)
    hyphen, colon = draw(st.sampled_from([("-", ":"), ("-", ":"), ("", "")]))
    day = local.strftime(f"%Y{hyphen}%m{hyphen}%d")
    between = draw(st.sampled_from(["T", " ", "t"]))
    fraction = f"{draw(st.sampled_from('.,'))}{local.microsecond:06d}{more}"
    time = local.strftime(f"%H{colon}%M{colon}%S") + (fraction if local.microsecond or more else "")
    return f"{day}{between}{time}{draw(endings(local.strftime('%z'), is_given=zone is not None))}"


def endings(offset: str, *, is_given: bool) -> st.SearchStrategy[str]:
    if not is_given:
        return st.just("")
    written = [offset, f"{offset[:3]}:{offset[3:]}", f" {offset[:3]}:{offset[3:]}", f" {offset} UTC"]
    written += [offset[:3]] if offset.endswith("00") else []
    return st.sampled_from(written + (["Z", "z", " UTC", " GMT"] if offset == "+0000" else []))


written = instants.flatmap(lambda at: st.tuples(st.just(at), texts(at)))


@pytest.mark.slow
@settings(max_examples=500 * EFFORT, deadline=None)
@given(written)
def test_every_writing_is_read_as_its_instant_and_is_found_in_its_hour(found: tuple[datetime, str]) -> None:
    at, text = found
    times, hour = TimestampReader(), window_at(at, 3600)
    reading = times.read(text)
    assert (reading.at, reading.reason) == (at, "")
    assert any(low <= text <= high for low, high in text_ranges(hour, reading.traits))
    assert is_found(times, text, is_text=True)
    assert HourTexts(times, hour).place(text)[0]
    for other in (window_at(at - timedelta(hours=1), 3600), window_at(at + timedelta(hours=1), 3600)):
        assert not HourTexts(times, other).place(text)[0]
        assert not HourTexts(times, other).has_all([text])


@pytest.mark.slow
@settings(max_examples=150 * EFFORT, deadline=None)
@given(st.lists(written, min_size=2, max_size=6))
def test_texts_of_any_writings_sort_by_their_instants(found: list[tuple[datetime, str]]) -> None:
    times = TimestampReader()
    in_order = [times.read(text).at for text in sorted((text for _, text in found), key=times.rank)]
    assert in_order == sorted(at for at, _ in found)


@settings(max_examples=400, deadline=None)
@given(instants, st.sampled_from(sorted(UNITS)), below, st.booleans())
def test_a_number_is_found_in_its_hour_whatever_the_newest_number_is(
    at: datetime,
    unit: str,
    more: str,
    is_set: bool,  # noqa: FBT001
) -> None:
    number, times, hour = number_of(at, unit, more), TimestampReader(unit if is_set else "auto"), window_at(at, 3600)
    assert times.read(number).at == at
    for newest in ("", *(number_of(at + timedelta(days=1), each, "") for each in UNITS if UNITS[each] >= UNITS[unit])):
        ranges = number_ranges(hour, times.unit, newest)
        assert any(Decimal(low) <= Decimal(number) <= Decimal(high) for low, high in ranges)


@settings(max_examples=300, deadline=None)
@given(st.text("0123456789-T.Z+: tz,eE", max_size=30) | st.text(max_size=8))
def test_any_text_is_read_or_has_a_reason_and_a_place_in_the_order(text: str) -> None:
    for unit in ("auto", *UNITS):
        times = TimestampReader(unit)
        reading = times.read(text)
        assert (reading.at is None) == (reading.reason in (UNREADABLE, OUTSIDE))
        assert len(times.rank(text)) == 2
        assert reading.at is not None or not is_found(times, text, is_text=True)
        assert not HourTexts(times, HOUR).has_all([text]) or HourTexts(times, HOUR).place(text)[0]


LETTERS = st.sampled_from("0123456789:.-+TZ t\n٣")
alike = st.sampled_from(["2026-02-07T12:00:00Z", "2026-02-07 12:59:59.25+00:00", "2026-02-07T12:30:00", "1770465600"])


@settings(max_examples=300 * EFFORT, deadline=None)
@given(alike, st.lists(st.tuples(st.integers(0, 30), LETTERS), max_size=4))
def test_texts_that_are_told_by_their_columns_are_all_of_the_hour(text: str, changes: list[tuple[int, str]]) -> None:
    hour = HourTexts(TimestampReader(), HOUR)
    texts = [text, *(f"{text[: at % len(text)]}{letter}{text[at % len(text) + 1 :]}" for at, letter in changes)]
    for given_texts in (texts, texts[::-1]):
        assert not hour.has_all(given_texts) or all(hour.place(each)[0] for each in texts)
    assert hour.has_all([text] * 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-02-07T12:00Z", HOUR.start),
        ("2026-02-07 12", HOUR.start),
        ("2026-02-07T12:59:60Z", datetime(2026, 2, 7, 12, 59, 59, 999999, tzinfo=UTC)),
        ("2026-02-07T14:00:00+02:00", HOUR.start),
        ("2026-02-06T22:15:00-13:45", HOUR.start),
        ("20260207T173000+0530", HOUR.start),
        ("1770465600", HOUR.start),
        ("1770465600000.000", HOUR.start),
        ("1.7704656E+9", HOUR.start),
    ],
)
def test_writings_of_which_one_would_not_think_are_read(text: str, expected: datetime) -> None:
    assert TimestampReader().read(text).at == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", UNREADABLE),
        ("yesterday", UNREADABLE),
        ("2026-02-07", UNREADABLE),
        ("2026-02-30T12:00:00Z", UNREADABLE),
        ("2026-02-07T12:61:00Z", UNREADABLE),
        ("2026-02-07T12:00:00+15:00", UNREADABLE),
        ("2026-02-07T12:00:00+02:60", UNREADABLE),
        ("2026-02-07T12:00:00Zulu", UNREADABLE),
        ("2026/02/07 12:00:00", UNREADABLE),
        ("٢٠٢٦-02-07T12:00:00Z", UNREADABLE),
        ("0001-01-01T00:00:00+14:00", OUTSIDE),
        ("0001-01-01T05:00:00Z", OUTSIDE),
        ("9999-12-31T23:30:00Z", OUTSIDE),
        ("20260207120000", OUTSIDE),
        ("12", OUTSIDE),
        ("-1770465600", OUTSIDE),
        ("1E+125", OUTSIDE),
        ("1E-130", OUTSIDE),
        ("9" * 38, OUTSIDE),
    ],
)
def test_what_cannot_be_read_has_a_reason(text: str, reason: str) -> None:
    reading = TimestampReader().read(text)
    assert (reading.at, reading.reason) == (None, reason)
    assert not is_found(TimestampReader(), text, is_text=True)


def test_a_unit_that_is_set_holds_also_before_2001_and_refuses_numbers_of_another_unit() -> None:
    assert TimestampReader("s").read("946684800").at == datetime(2000, 1, 1, tzinfo=UTC)
    assert TimestampReader("s").read("-1").at == EPOCH - timedelta(seconds=1)
    assert TimestampReader("s").read("1770465600000").reason == OUTSIDE
    assert TimestampReader("ms").read("1770465600").reason == OUTSIDE
    assert (TimestampReader("s").other_unit("1770465600000"), TimestampReader("ms").other_unit("1770465600")) == (
        "ms",
        "s",
    )
    assert {TimestampReader(unit).other_unit("1770465600") for unit in ("auto", "s")} == {""}


def test_an_hour_is_asked_in_three_ranges_until_another_writing_was_seen() -> None:
    assert [low for low, _ in text_ranges(HOUR, ())] == ["2026-02-07T12", "2026-02-07 12", "1770465600"]
    around = [low for low, _ in text_ranges(HOUR, {TextTrait.OFFSET})]
    days = ("2026-02-06{}22", "2026-02-07{}00", "2026-02-08{}00")
    assert around == [*(day.format(between) for day in days for between in "T "), "1770465600"]
    every = [low for low, _ in text_ranges(HOUR, EVERY_TRAIT)]
    assert len(every) == 15
    assert {"2026-02-07", "20260207"} < set(every), "the day of the hour is asked for whole"


def test_the_hour_in_which_epoch_seconds_got_a_digit_more_is_found_whole() -> None:
    hour = window_at(datetime(2001, 9, 9, 1, 46, 40, tzinfo=UTC), 3600)
    for text in ("999997200", "999999999.9", "1000000000", "1000000799"):
        assert TimestampReader("s").read(text).at is not None
        assert any(low <= text <= high for low, high in text_ranges(hour, ()))


def test_numbers_are_asked_in_units_up_to_that_of_the_newest_and_in_the_one_that_is_set() -> None:
    def asked(unit: str, newest: str = "") -> Sequence[str]:
        return [low for low, _ in number_ranges(HOUR, unit, newest)]

    seconds, millis, micros = "1770465600", "1770465600000", "1770465600000000"
    assert asked("auto") == [seconds, millis, micros]
    assert asked("auto", "1770465601.5") == [seconds]
    assert asked("auto", "1770465601500") == [seconds, millis]
    assert asked("ms", seconds) == [millis]


@pytest.mark.parametrize("write", [str.upper, "{} ".format])
def test_blanks_behind_a_timestamp_and_capitals_change_nothing(write: Callable[[str], str]) -> None:
    assert TimestampReader().read(write("2026-02-07t12:00:00z")).at == HOUR.start


def test_the_hour_of_the_epoch_is_found_as_well() -> None:
    found = list(text_ranges(window_at(EPOCH, 3600), ()))
    for text in ("0", "9", "1000", "3599.9"):
        assert any(low <= text <= high for low, high in found), text


@pytest.mark.parametrize(("unit", "digits"), [("s", 0), ("ms", 3), ("us", 6)])
def test_the_size_of_a_number_tells_its_unit_from_2001_to_2286(unit: str, digits: int) -> None:
    first, end = Decimal(10 ** (9 + digits)), Decimal(10 ** (10 + digits))
    assert [unit_of(each) for each in (first - 1, first, end - 1, end)] == ["", unit, unit, ""]


def test_a_number_has_at_most_as_many_characters_as_dynamodb_writes() -> None:
    number = "1770465600.".ljust(MAX_NUMBER_CHARACTERS, "0")
    assert TimestampReader().read(number).at == HOUR.start
    assert TimestampReader().read(f"{number}0").reason == UNREADABLE


def test_a_negative_zero_is_the_epoch_without_a_fraction() -> None:
    assert [
        (TimestampReader("s").read(text).at, TimestampReader("s").read(text).fraction) for text in ("-0", "-0.0")
    ] == [(EPOCH, "")] * 2


def test_text_that_is_no_timestamp_has_the_place_of_its_letters_among_those_that_are() -> None:
    texts = ["yesterday", "2026-02-07t12:00:01", "12", "2026-02-07 12:00:00x", "2026-02-07T12:00:00Z"]
    assert sorted(texts, key=TimestampReader().rank) == [texts[at] for at in (2, 4, 3, 1, 0)]
    assert TimestampReader().rank("2026-02-07 12:00:00x") == ("2026-02-07T12:00:00x", "")
    assert TimestampReader().rank("1E+125") == ("1E+125", "")


def test_ascending_texts_are_told_only_where_their_ranks_ascend_as_well() -> None:
    ascending = ["2026-02-07T12:00:00.1Z", "2026-02-07T12:00:00.2Z"]
    assert ascend(ascending)
    assert not ascend(ascending[::-1])
    assert not ascend([ascending[0]] * 2)
    for texts in (
        ["2026-02-07T12:00:00Z", "2026-02-07T12:00:01Z"],
        ["2026-02-07 12:00:00", "2026-02-08 12:00:00"],
        ["1770465600", "1770465601"],
        ["1770465600000", "1770465600001"],
    ):
        assert ascend(texts)
    for texts in (
        ["2026-02-07 13:00:00Z", "2026-02-07T12:00:00Z"],
        ["2026-02-07T12:00:00+00:00", "2026-02-07T12:00:00+01:00"],
        ["2026-02-07T12:00:00.1Z", "2026-02-07T12:00:00.xZ"],
        ["0770465600", "1770465601"],
        ["17704656000", "17704656001"],
        ["2026-02-07", "2026-02-08"],
    ):
        assert not ascend(texts)


@given(st.lists(written | st.text("0123456789-T.Z+: ", max_size=25).map(lambda text: (EPOCH, text)), max_size=5))
def test_what_is_said_to_ascend_does(found: list[tuple[datetime, str]]) -> None:
    texts = sorted(text for _, text in found)
    ranks = [TimestampReader().rank(text) for text in texts]
    assert not ascend(texts) or ranks == sorted(set(ranks))
