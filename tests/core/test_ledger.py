"""A run whose ledger does not close is not ok; what was set aside before does not make it partial again."""

import json

from app.core.ledger import ALL, Ledger, SetAside, Tally, fault_of, from_json, ledger_of, sampled, summary_of, to_json


def test_a_ledger_that_closes_has_no_fault() -> None:
    ledger = ledger_of(Tally(counted=6, read=6, new=3, already_there=1, corrected=1, waiting=1), unit="items")
    assert ledger.closes
    assert fault_of(ledger) is None


def test_a_row_that_is_lost_in_one_field_is_named_even_when_another_field_has_one_too_many() -> None:
    ledger = Ledger("values", {"a": Tally(counted=3, new=2), "b": Tally(counted=3, new=4)})
    assert ledger.total.gap == 0
    assert not ledger.closes
    fault = fault_of(ledger)
    assert fault is not None
    assert fault[0].startswith("1 values of a are not accounted for: 3 counted, 2 new")


def test_what_is_newly_set_aside_is_a_fault_and_what_was_set_aside_before_is_not() -> None:
    before = ledger_of(Tally(counted=2), SetAside("device id cannot name an object", 2, 0, "a/b"), unit="values")
    now = ledger_of(Tally(counted=2), SetAside("no device tag", 2, 2, "m voltage=1 5"), unit="values")
    assert before.closes
    assert fault_of(before) is None
    fault = fault_of(before + now)
    assert fault is not None
    assert fault[0] == "2 values set aside: no device tag, for example m voltage=1 5"


def test_ledgers_add_up_by_field_reason_and_partition() -> None:
    one = Ledger("values", {"a": Tally(counted=1, waiting=1)}, (SetAside("x", 1, 0, "s"),)).of_partition("D1")
    other = Ledger("values", {"a": Tally(counted=2, new=2), "b": Tally(counted=1, new=1)}, (SetAside("x", 2, 1),))
    both = one + other.of_partition("D2")
    assert both.fields == {"a": Tally(counted=3, new=2, waiting=1), "b": Tally(counted=1, new=1)}
    assert both.set_aside == (SetAside("x", 3, 1, "s"),)
    assert list(both.partitions) == ["D1"], "a partition whose rows all landed is not worth naming"


def test_what_waits_in_one_run_and_lands_in_the_next_is_counted_once_in_the_sum_of_both() -> None:
    first = Ledger("values", {"a": Tally(counted=5, new=3, waiting=2)}).of_partition("D1")
    second = Ledger("values", {"a": Tally(counted=2, new=2)})
    assert (first.settled() + second).total == Tally(counted=5, new=5)
    assert first.settled().closes


def test_a_ledger_survives_its_json() -> None:
    with_fields = Ledger("values", {"a": Tally(counted=1, waiting=1)}, (SetAside("x", 1, 0, "s"),)).of_partition("D1")
    without = ledger_of(Tally(counted=6, read=6, new=6), unit="items")
    assert from_json(to_json(with_fields)) == with_fields
    assert from_json(to_json(without)) == without
    assert from_json({}) == Ledger()
    assert to_json(without)["counted"] == 6
    assert to_json(without)["fields"] == {}


def test_the_record_of_a_run_stays_short() -> None:
    fields = {f"f{i:03}": Tally(counted=1, new=1) for i in range(300)}
    ledger = sum(
        (
            Ledger("values", fields).__add__(Ledger("values", fields, (), {f"D{i}": Tally(corrected=1)}))
            for i in range(99)
        ),
        Ledger(),
    )
    assert len(ledger.fields) == 100
    assert ledger.total.counted == ledger.total.new == 300 * 2 * 99
    assert len(ledger.partitions) == 20
    assert len(sampled("x\n" * 1000)) < 250


def test_without_fields_all_is_one_entry() -> None:
    assert list(ledger_of(Tally(), unit="lines").fields) == [ALL]


def test_the_line_for_people_leaves_out_what_is_zero_and_names_reasons_with_a_sample() -> None:
    assert summary_of(Ledger()) == ""
    assert summary_of(ledger_of(Tally(), unit="items")) == "0 items counted"
    plain = ledger_of(Tally(counted=18, read=18, new=12, already_there=6), unit="values")
    assert summary_of(plain) == "18 values counted: 12 new, 6 already there"
    odd = ledger_of(Tally(counted=9, corrected=1, waiting=2), SetAside("no device tag", 3, 1, "m v=1 5"), unit="values")
    assert summary_of(odd) == (
        "9 values counted: 1 corrected, 3 set aside (3 no device tag, 1 of them new, for example m v=1 5), "
        "2 waiting, 3 NOT ACCOUNTED FOR"
    )


def test_gaps_of_two_fields_do_not_cancel_out() -> None:
    ledger = Ledger("values", {"a": Tally(counted=3, new=2), "b": Tally(counted=3, new=4)})
    assert ledger.gap == 2
    assert summary_of(ledger).endswith("2 NOT ACCOUNTED FOR")


def test_what_belongs_to_no_field_survives_the_json_beside_fields() -> None:
    mixed = Ledger("values", {"a": Tally(counted=2, new=2)}) + ledger_of(
        Tally(counted=3), SetAside("no device tag", 3, 3), unit="values"
    )
    assert from_json(to_json(mixed)) == mixed


def test_text_from_outside_is_one_printable_line_and_can_be_encoded() -> None:
    hostile = "a\nb\x1b[31m\ud800\u202e\x00" + "x" * 10_000
    assert sampled(hostile).startswith(r"a b\x1b[31m\ud800\u202e\x00xxx")
    assert len(sampled(hostile)) < 210
    ledger = Ledger("values", {hostile: Tally(counted=1, set_aside=1)}, (SetAside("x", 1, 1, hostile),))
    shown = json.dumps(to_json(ledger.of_partition(hostile)), ensure_ascii=False)
    assert shown.encode()


def test_only_a_partition_that_a_person_would_want_to_see_is_named() -> None:
    for odd in (Tally(1, corrected=1), Tally(1, set_aside=1), Tally(1, waiting=1), Tally(new=1)):
        assert list(Ledger("rows", {ALL: odd}).of_partition("D1").partitions) == ["D1"]
    assert not Ledger("rows", {ALL: Tally(counted=2, new=1, already_there=1)}).of_partition("D1").partitions
    assert list(Ledger("rows", {ALL: Tally(counted=1)}).of_partition("").partitions) == ["(unnamed)"]


def test_a_ledger_is_empty_only_without_any_entry() -> None:
    assert not Ledger()
    for some in (
        Ledger(fields={ALL: Tally()}),
        Ledger(set_aside=(SetAside("x", 1),)),
        Ledger(partitions={"D": Tally()}),
    ):
        assert some
        assert some + Ledger() == Ledger() + some == some


def test_a_sample_is_cut_only_when_it_is_too_long() -> None:
    assert sampled("x" * 200) == "x" * 200
    assert sampled("x" * 201) == "x" * 200 + "..."
