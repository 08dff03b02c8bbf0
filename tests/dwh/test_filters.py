"""What a reader of the warehouse may ask for: filters, orders, columns and counts, on both databases."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import parse_qsl

import pytest

from app.dwh.query import KeysetPosition, filter_of, selection
from app.dwh.tables import EVENTS, LOCATIONS, PERMANENT, TECHNICAL, Table
from app.dwh.warehouse import open_warehouse
from app.web.errors import Refused
from warehouse import Desk, rows_of, uuid_of


def test_orders_are_the_same_in_both_databases(desk: Desk) -> None:
    genders = ["b", "B", None, "a", "ä", "Z", ""]
    desk.post(PERMANENT, [{"ehr_id": n, "gender": gender} for n, gender in enumerate(genders)])
    assert [row["ehr_id"] for row in desk.get(PERMANENT)] == [6, 5, 4, 3, 2, 1, 0]
    ascending = [row["gender"] for row in desk.get(PERMANENT, sort_by="gender", sort_dir="asc")]
    assert ascending == ["", "B", "Z", "a", "b", "ä", None]
    descending = [row["gender"] for row in desk.get(PERMANENT, sort_by="gender")]
    assert descending == ["ä", "b", "a", "Z", "B", "", None]


@pytest.mark.parametrize(
    ("table", "params", "found"),
    [
        (EVENTS, {"pk": 2}, [2]),
        (EVENTS, {"pk": 99}, []),
        (EVENTS, {"id": 2, "pk": 2}, [2]),
        (EVENTS, {"uuid": uuid_of(1).upper()}, [2]),
        (EVENTS, {"event_time": "2026-02-07T13:34:02.789+01:00"}, [3]),
        (EVENTS, {"event_time": "2026-02-07 12:34:02.789"}, [3]),
        (EVENTS, {"event_id": 2**53}, [1]),
        (EVENTS, {"event_id": 2**53, "session_id": 1}, []),
        (EVENTS, {"user_id": "text 1 \\ \t\n'\"ü😀"}, [2]),
        (EVENTS, {"user_id": "x' OR '1'='1"}, []),
        (LOCATIONS, {"location_lat": 55.755831234567891}, [1]),
        (TECHNICAL, {"is_attribution_event": "true"}, [3, 1]),
        (TECHNICAL, {"is_attribution_event": "False"}, [2]),
        (EVENTS, {"after_id": 3}, [2, 1]),
        (EVENTS, {"after_id": 1, "sort_dir": "asc"}, [2, 3]),
        (EVENTS, {"offset": 1, "limit": 1}, [2]),
        (EVENTS, {"offset": 2**62}, []),
    ],
)
def test_rows_are_found_by_equality(desk: Desk, table: Table, params: dict[str, Any], found: list[int]) -> None:
    desk.post(table, rows_of(table, 3))
    assert [row["id"] for row in desk.get(table, **params)] == found


@pytest.mark.parametrize(
    ("params", "status", "fault"),
    [
        ({"colour": 1}, 400, "colour"),
        ({"sort_by": "colour"}, 400, "sort_by"),
        ({"sort_by": "plan_json"}, 400, "sort_by"),
        ({"plan_json": "1"}, 400, "plan_json"),
        ({"sort_dir": "up"}, 400, "sort_dir"),
        ({"format": "xml"}, 400, "format"),
        ({"amplitude_id": "x"}, 400, "amplitude_id"),
        ({"amplitude_id": 2**63}, 400, "amplitude_id"),
        ({"uuid": "x"}, 400, "uuid"),
        ({"is_attribution_event": "1"}, 400, "is_attribution_event"),
        ({"created_at": "now"}, 400, "created_at"),
        ({"library": "\x00"}, 400, "library"),
        ({"limit": 0}, 422, "limit"),
        ({"limit": 10_001}, 422, "limit"),
        ({"limit": "²"}, 422, "limit"),
        ({"offset": -1}, 422, "offset"),
        ({"offset": 10**30}, 422, "offset"),
        ({"after_id": 1, "sort_by": "library"}, 422, "after_id"),
        ({"after_id": 1, "offset": 5}, 422, "after_id"),
        ({"after": "x"}, 422, "after"),
        ({"after": KeysetPosition(3, "a").token("insert_id"), "sort_by": "library"}, 422, "after"),
        ({"after": KeysetPosition(3, "a").token("library"), "sort_by": "library", "after_id": 1}, 422, "after"),
        ({"plan_json": "eq.1"}, 400, "plan_json"),
        ({"library": "is.true"}, 400, "library"),
        ({"amplitude_id": "like.1*"}, 400, "amplitude_id"),
        ({"amplitude_id": "in.1,2"}, 400, "amplitude_id"),
        ({"amplitude_id": "in.(1,x)"}, 400, "amplitude_id"),
        ({"library": 'in.("a)'}, 400, "library"),
        ({"library": "in.(a,b"}, 400, "library"),
        ({"library": "like.\x00"}, 400, "library"),
        ({"select": "colour"}, 400, "select"),
        ({"select": "id,id"}, 400, "select"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name(params: dict[str, Any], status: int, fault: str) -> None:
    with pytest.raises(Refused) as refused:
        selection(TECHNICAL, [(name, str(value)) for name, value in params.items()])
    assert (refused.value.refusal.status, refused.value.refusal.fault) == (status, fault)


PEOPLE = [
    {"uuid": uuid_of(n), "event_type": name, "platform": grade, "event_id": age, "session_id": n % 2, "event_time": at}
    for n, (name, grade, age, at) in enumerate(
        [
            ("OReilly, Ann", "A", 12, "2026-02-01T00:00:00Z"),
            ("orange", "B", 13, "2026-02-02T00:00:00Z"),
            ("in.app", None, 18, "2026-02-03T00:00:00Z"),
            ("hi,there", "A", 21, "2026-02-04T00:00:00Z"),
            ('yes "you"', "C", 65, None),
            ("50%_[x]*?", "c", None, "2026-02-06T00:00:00Z"),
            ("Ölüm Привет", "", 2**40, "2026-02-07T00:00:00Z"),
            (None, "B", -7, "2026-02-08T00:00:00.123456789Z"),
        ]
    )
]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def people(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("people")
    url = request.getfixturevalue("postgres_server").new_database() if request.param == "postgres" else ""
    with closing(open_warehouse(url, folder)) as warehouse:
        desk = Desk(warehouse)
        desk.post(EVENTS, PEOPLE)
        yield desk


@pytest.mark.parametrize(
    ("query", "found"),
    [
        # https://docs.postgrest.org/en/stable/references/api/tables_views.html, "Horizontal Filtering"
        ("event_id=lt.13", [0, 7]),
        ("event_id=gte.18&session_id=eq.1", [3]),
        ("event_id=gte.13&event_id=lte.21", [1, 2, 3]),
        ("event_id=eq.13", [1]),
        ("event_id=neq.13", [0, 2, 3, 4, 6, 7]),
        ("event_id=gt.21", [4, 6]),
        ("event_id=not.eq.13", [0, 2, 3, 4, 6, 7]),
        ("event_id=not.gt.13", [0, 1, 7]),
        ("event_id=is.null", [5]),
        ("event_id=not.is.null", [0, 1, 2, 3, 4, 6, 7]),
        ("event_id=is.not_null", [0, 1, 2, 3, 4, 6, 7]),
        ("event_id=in.(12,13,99)", [0, 1]),
        ("event_id=not.in.(12,13)", [2, 3, 4, 6, 7]),
        ("event_id=in.()", []),
        ('event_type=in.("hi,there","yes \\"you\\"")', [3, 4]),
        ("event_type=in.(orange,in.app)", [1, 2]),
        ("event_type=like.OR*", [0]),
        ("event_type=like.or*", [1]),
        ("event_type=ilike.OR*", [0, 1]),
        ("event_type=not.ilike.or*", [2, 3, 4, 5, 6]),
        ("event_type=like.*,*", [0, 3]),
        ("event_type=like.%25re%25", [3]),
        ("event_type=like.oran_e", [1]),
        ("event_type=like.50\\%25\\_[x]\\*?", [5]),
        ("event_type=like.50\\%25*[x]*?", [5]),
        ("event_type=like.[x]", []),
        ("event_type=ilike.öl_m *ПРИВ*", [6]),
        ("event_time=gte.2026-02-03&event_time=lt.2026-02-05T00:00:00Z", [2, 3]),
        ("event_time=is.null", [4]),
        ("event_time=eq.2026-02-08T00:00:00.123456789Z", [7]),  # as it was posted, which is rounded
        ("event_time=eq.2026-02-02T05:30:00%2B05:30", [1]),
        ("event_time=eq.2026-02-02T05:30:00+05:30", [1]),  # the plus comes as a blank
        ("event_time=in.(2026-02-01 02:00:00 0200,2026-02-03)", [0, 2]),
        ("uuid=gt." + uuid_of(5), [6, 7]),
        ("uuid=in.(" + uuid_of(5).upper() + ")", [5]),
        ("platform=gt.B", [4, 5]),
        ("platform=eq.", [6]),
        ("platform=lte.A", [0, 3, 6]),
        # What is no operator of the list is the text itself; eq. asks for a text that looks like one.
        ("event_type=eq.in.app", [2]),
        ("event_type=orange", [1]),
        ("event_type=match.orange", []),
        ("event_type=eq.orange&event_type=eq.in.app", []),
        ("created_at=gt.2020-01-01&id=gt.0&id=not.in.(1,2,3,4,5,6)", [6, 7]),
    ],
)
def test_filters_are_those_of_postgrest(people: Desk, query: str, found: list[int]) -> None:
    given = [(name, value) for name, value in parse_qsl(query, keep_blank_values=True)]
    assert [row["uuid"] for row in people.rows(EVENTS, [*given, ("sort_dir", "asc")])] == [uuid_of(n) for n in found]


def test_true_false_and_json_can_be_asked_for(people: Desk) -> None:
    flags = [True, False, None]
    people.post(TECHNICAL, [{"uuid": uuid_of(n), "is_attribution_event": flags[n]} for n in range(3)])
    people.post(TECHNICAL, [{"uuid": uuid_of(3), "plan_json": {"a": 1}}])
    for value, found in {"is.true": [1], "is.false": [2], "not.is.true": [4, 3, 2], "neq.true": [2]}.items():
        assert [row["id"] for row in people.get(TECHNICAL, is_attribution_event=value)] == found
    assert [row["id"] for row in people.get(TECHNICAL, plan_json="not.is.null")] == [4]


def test_select_chooses_the_columns_and_their_order(people: Desk) -> None:
    wanted = {"event_type": "eq.in.app", "sort_by": "event_time"}
    assert people.get(EVENTS, select="event_id, event_type", **wanted) == [{"event_id": 18, "event_type": "in.app"}]
    assert list(people.get(EVENTS, select="event_id,id", limit=1)[0]) == ["event_id", "id"]
    assert people.read(EVENTS, select="platform,uuid", format="csv", limit=1).body.startswith(b"platform,uuid\n")
    assert len(people.get(EVENTS, select="*", limit=1)[0]) == len(EVENTS.stored)


def test_a_count_is_of_all_rows_that_meet_the_filters(people: Desk) -> None:
    chosen = selection(EVENTS, [("event_id", "gte.13"), ("limit", "2")])
    with people.warehouse.selected(chosen, count=True) as found:
        assert found.total == 5
        assert found.last() == KeysetPosition(5)


@pytest.mark.parametrize(
    ("params", "total", "content_range"),
    [
        ({"limit": 2}, 5, "0-1/5"),
        ({"limit": 2, "offset": 3}, 5, "3-4/5"),
        ({"limit": 2, "offset": 4}, 5, "4-4/5"),
        ({"limit": 2, "offset": 5}, 5, "*/5"),
        ({}, 0, "*/0"),
        ({"after_id": 3}, 5, "*/5"),
    ],
)
def test_the_content_range_says_which_of_all_rows_the_answer_has(
    params: dict[str, int], total: int, content_range: str
) -> None:
    chosen = selection(EVENTS, [(name, str(value)) for name, value in params.items()])
    assert chosen.content_range(total) == content_range


def test_text_is_compared_by_its_bytes_whatever_the_collation_of_the_database() -> None:
    ordered = {name: filter_of(EVENTS.columns[1], f"{name}.a").sql("postgres", "f")[0] for name in ("gt", "lte", "eq")}
    assert ordered == {
        "gt": 'event_type COLLATE "C" > :f_0',
        "lte": 'event_type COLLATE "C" <= :f_0',
        "eq": "event_type = :f_0",
    }
