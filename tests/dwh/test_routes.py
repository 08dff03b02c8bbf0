"""/dwh over HTTP, with the real daemon on both databases. Each test uses rows of its own."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from app.dwh.tables import DEVICES, EVENTS, LOCATIONS, TABLES, TECHNICAL
from warehouse import ndjson, packed, rows_of, uuid_of

JSON = {"Content-Type": "application/json"}
LINES = {"Content-Type": "application/x-ndjson"}
CSV = {"Content-Type": "text/csv"}
GZIP = {"Content-Encoding": "gzip"}
numbers = itertools.count(1_000_000, 100_000)


def fresh(table: Any, count: int) -> list[dict[str, Any]]:
    return rows_of(table, count, first=next(numbers))


def post(served: httpx.Client, path: str, rows: Any, **how: Any) -> httpx.Response:
    return served.post(f"/dwh/{path}", json={"data": rows}, **how)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.path)
def test_documented_requests_have_the_documented_answers(served: httpx.Client, table: Any) -> None:
    rows = fresh(table, 3)
    first = post(served, table.path, rows)
    assert (first.status_code, first.headers["content-type"]) == (200, "application/json")
    answer = first.json()
    assert list(answer) == ["inserted_ids", "count", "batches", "skipped"]
    ids = answer["inserted_ids"]
    assert answer == {"inserted_ids": [ids[0], ids[0] + 1, ids[0] + 2], "count": 3, "batches": 1, "skipped": 0}
    again = post(served, table.path, rows)
    assert again.json() == {"inserted_ids": [], "count": 0, "batches": 1, "skipped": 3}
    read = served.get(f"/dwh/{table.path}", params={"limit": 3})
    assert list(read.json()) == ["rows", "count"]
    assert read.json()["count"] == 3
    assert [row["id"] for row in read.json()["rows"]] == ids[::-1]
    assert served.get(f"/dwh/{table.path}", params={"pk": ids[1]}).json()["rows"] == read.json()["rows"][1:2]
    assert served.get(f"/dwh/{table.path}", params={"pk": 10**12}).json() == {"rows": [], "count": 0}


def test_fifteen_hundred_rows_are_two_batches(served: httpx.Client) -> None:
    answer = post(served, "user-locations", [{"uuid": uuid_of(next(numbers) + n)} for n in range(1500)]).json()
    assert (answer["count"], answer["batches"], len(set(answer["inserted_ids"]))) == (1500, 2, 1500)


def test_no_rows_are_400_and_a_bad_row_is_422_and_stores_nothing(served: httpx.Client) -> None:
    assert post(served, "events-part", []).status_code == 400
    rows = fresh(EVENTS, 3)
    refused = post(served, "events-part", [*rows, {**rows[0], "event_id": "x"}])
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error["field"] == "data.3.event_id"
    assert "row 3" in error["message"]
    assert "event_id" in error["message"]
    assert "on_error=skip" in error["hint"]
    assert served.get("/dwh/events-part", params={"uuid": rows[0]["uuid"]}).json()["count"] == 0


def test_bad_rows_can_be_skipped_and_are_named(served: httpx.Client) -> None:
    good = fresh(TECHNICAL, 2)
    rows = [good[0], {"uuid": "x"}, good[1], {"library": "l"}]
    answer = post(served, "technical-data", rows, params={"on_error": "skip"}).json()
    assert (answer["count"], answer["skipped"], answer["error_count"]) == (2, 0, 2)
    assert [(error["index"], error["field"]) for error in answer["errors"]] == [(1, "uuid"), (3, "uuid")]
    assert all(error["message"] for error in answer["errors"])
    none = post(served, "technical-data", [{"uuid": "x"}], params={"on_error": "skip"}).json()
    assert (none["inserted_ids"], none["count"], none["batches"]) == ([], 0, 0)


def test_a_dry_run_stores_nothing(served: httpx.Client) -> None:
    rows = fresh(DEVICES, 2)
    answer = post(served, "mobile-devices", rows, params={"dry_run": "true"}).json()
    assert answer == {"inserted_ids": [], "count": 2, "batches": 1, "skipped": 0, "dry_run": True}
    assert served.get("/dwh/mobile-devices", params={"device_id": rows[0]["device_id"]}).json()["count"] == 0


def test_an_idempotency_key_repeats_the_answer(served: httpx.Client) -> None:
    rows = fresh(EVENTS, 2)
    key = {"Idempotency-Key": f"key-{next(numbers)}"}
    first, again = (post(served, "events-part", rows, headers=key) for _ in range(2))
    assert first.json() == again.json()
    assert again.json()["count"] == 2
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    other = post(served, "events-part", rows[:1], headers=key)
    assert (other.status_code, other.json()["error"]["field"]) == (409, "Idempotency-Key")


@pytest.mark.parametrize("gzipped", [False, True])
def test_every_kind_of_body_stores_the_same(served: httpx.Client, *, gzipped: bool) -> None:
    rows = fresh(LOCATIONS, 3)
    head = ",".join(LOCATIONS.names)
    cells = ['"' + str(value).replace('"', '""') + '"' for row in rows for value in row.values()]
    width = len(LOCATIONS.names)
    csv = "\n".join([head, *(",".join(cells[start : start + width]) for start in range(0, len(cells), width))])
    bodies = [(JSON, json.dumps({"data": rows}).encode()), (LINES, ndjson(rows)), (CSV, csv.encode())]
    stored = []
    for headers, body in bodies:
        sent = served.post(
            "/dwh/user-locations",
            content=packed(body) if gzipped else body,
            headers={**headers, **(GZIP if gzipped else {})},
            params={"dry_run": "false"},
        )
        stored.append(sent.json())
    assert [(answer["count"], answer["skipped"]) for answer in stored] == [(3, 0), (0, 3), (0, 3)]


def test_a_large_ndjson_body_passes_where_json_may_not(served: httpx.Client) -> None:
    rows = fresh(LOCATIONS, 12_000)
    body = ndjson(rows)
    assert len(body) > 2_000_000
    refused = served.post("/dwh/user-locations", content=json.dumps({"data": rows}).encode(), headers=JSON)
    assert refused.status_code == 413
    answer = served.post("/dwh/user-locations", content=body, headers=LINES).json()
    assert (answer["count"], answer["batches"]) == (12_000, 12)


@pytest.mark.parametrize(
    ("headers", "params", "status"),
    [
        ({"Content-Type": "application/xml"}, {}, 415),
        ({"Content-Type": "application/json; charset=latin-1"}, {}, 415),
        ({**JSON, "Content-Encoding": "br"}, {}, 415),
        ({**JSON, **GZIP}, {}, 400),
        (JSON, {"on_error": "maybe"}, 422),
        (JSON, {"dryrun": "true"}, 400),
        (JSON, {"dry_run": "perhaps"}, 422),
        ({**JSON, "Idempotency-Key": "x" * 256}, {}, 422),
        ({**JSON, "Idempotency-Key": ""}, {}, 422),
    ],
)
def test_what_is_not_understood_is_refused(
    served: httpx.Client, headers: dict[str, str], params: dict[str, str], status: int
) -> None:
    body = json.dumps({"data": fresh(EVENTS, 1)}).encode()
    refused = served.post("/dwh/events-part", content=body, headers=headers, params=params)
    assert refused.status_code == status
    assert refused.json()["error"]["hint"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00",
        b"NaN",
        b'{"data":[NaN]}',
        b'{"data":[{"uuid":1e400}]}',
        b'{"data":[{"uuid":' + b"9" * 5000 + b"}]}",
        b'{"data":' + b"[" * 900_000,
        b'{"data":[' + b'{"a":' * 300_000,
        b'{"data":[{"uuid":"\xff\xfe"}]}',
        b'{"data":[{"uuid":"\\ud800"}]}',
        b'{"data":[{"event_properties_json":' + b"[" * 50_000 + b"]" * 50_000 + b"}]}",
        '{"data":[]}'.encode("utf-16"),
    ],
)
def test_hostile_bodies_are_4xx(served: httpx.Client, body: bytes) -> None:
    answer = served.post("/dwh/event-properties", content=body, headers=JSON)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]


def test_pages_are_linked(served: httpx.Client) -> None:
    post(served, "user-properties", [{"uuid": uuid_of(next(numbers)), "language": "xx"} for _ in range(7)])
    url: str | None = "/dwh/user-properties?limit=3&language=xx"
    sizes = []
    while url:
        answer = served.get(url)
        sizes.append(answer.json()["count"])
        url = answer.links.get("next", {}).get("url")
    assert sizes == [3, 3, 1]


def test_head_and_prefer_tell_of_the_rows_without_them(served: httpx.Client) -> None:
    mine = f"walk-{next(numbers)}"
    post(served, "user-locations", [{"uuid": uuid_of(next(numbers)), "city": mine} for _ in range(5)])
    query = f"/dwh/user-locations?city={mine}&limit=2&select=id&sort_by=region"
    counted = {"Prefer": 'respond-async, count="exact"; note=1'}
    got, head = (served.request(method, query, headers=counted) for method in ("GET", "HEAD"))
    assert (got.json()["count"], head.status_code, head.content) == (2, 200, b"")
    told = {"content-range": "0-1/5", "preference-applied": "count=exact", "link": got.headers["link"]}
    for name, value in told.items():
        assert (got.headers[name], head.headers[name]) == (value, value)
    assert head.headers["content-type"] == got.headers["content-type"]
    assert "content-length" not in head.headers, "it would be that of the rows"
    second = served.get(got.links["next"]["url"], headers=counted)
    assert (second.headers["content-range"], second.json()["count"], len(second.links)) == ("*/5", 2, 1)
    plain = served.head(query.replace("limit=2", "limit=5"))
    assert not {"content-range", "preference-applied", "link"} & set(plain.headers)
    assert served.head("/dwh/user-locations?colour=1").status_code == 400
    assert served.get("/dwh/user-locations?city=%ff").status_code == 422, "it would be read as another city"


def test_duplicates_are_resolved_as_the_caller_prefers(served: httpx.Client) -> None:
    rows = [{"uuid": uuid_of(next(numbers)), "city": "a"}]
    post(served, "user-locations", rows)
    merge = {"Prefer": "resolution=merge-duplicates"}
    answer = post(served, "user-locations", [{**rows[0], "city": "b"}], headers=merge)
    assert (answer.json()["skipped"], answer.headers["preference-applied"]) == (1, "resolution=merge-duplicates")
    unknown = post(served, "user-locations", [{**rows[0], "city": "c"}], headers={"Prefer": "resolution=guess"})
    assert "preference-applied" not in unknown.headers
    assert [row["city"] for row in served.get(f"/dwh/user-locations?uuid={rows[0]['uuid']}").json()["rows"]] == ["b"]


def test_answers_are_compressed_when_asked_for(served: httpx.Client) -> None:
    mine = f"gzip-{next(numbers)}"
    post(served, "user-locations", [{"uuid": uuid_of(next(numbers)), "city": mine} for _ in range(300)])
    for format_ in ("json", "ndjson", "csv", "parquet"):
        query = f"/dwh/user-locations?city={mine}&limit=300&format={format_}"
        plain = served.get(query, headers={"Accept-Encoding": "br, gzip;q=0"})
        asked = served.get(query, headers={"Accept-Encoding": "deflate, gzip;q=0.5"})
        assert "content-encoding" not in plain.headers
        assert (asked.headers.get("content-encoding") == "gzip") is (format_ != "parquet")
        assert asked.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"
        if format_ != "parquet":
            assert asked.content == plain.content
            assert int(asked.headers["content-length"]) * 3 < len(plain.content)
    many = post(served, "user-locations", [{"uuid": uuid_of(next(numbers))} for _ in range(1001)])
    assert (many.headers["content-encoding"], many.json()["count"]) == ("gzip", 1001)
    small = served.get(f"/dwh/user-locations?city={mine}&limit=1&select=id", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in small.headers


def test_rows_are_deleted_for_good_on_request(served: httpx.Client) -> None:
    rows = [{"uuid": uuid_of(next(numbers)), "city": "Erased"} for _ in range(2)]
    post(served, "user-locations", rows)
    named = f"in.({','.join(row['uuid'] for row in rows)})"

    def delete(**params: Any) -> httpx.Response:
        return served.delete("/dwh/user-locations", params=params)

    refused = [delete(), delete(dry_run="true"), delete(colour="x"), delete(city="x", forget="true"), delete(uuid="x")]
    assert [answer.status_code for answer in refused] == [400, 400, 400, 422, 400]
    dry = {"deleted": 2, "remembered": 2, "forgotten": 0, "dry_run": True}
    assert delete(uuid=named, dry_run="true").json() == dry
    assert delete(uuid=named).json() == {"deleted": 2, "remembered": 2, "forgotten": 0}
    assert post(served, "user-locations", rows).json()["skipped"] == 2
    assert delete(uuid=named, forget="true").json() == {"deleted": 0, "remembered": 0, "forgotten": 2}
    assert post(served, "user-locations", rows).json()["count"] == 2


def test_files_have_their_type_and_name(served: httpx.Client) -> None:
    post(served, "user-locations", fresh(LOCATIONS, 2))
    types = {
        "csv": "text/csv; charset=utf-8",
        "ndjson": "application/x-ndjson",
        "parquet": "application/vnd.apache.parquet",
    }
    for format_, media_type in types.items():
        answer = served.get(
            "/dwh/user-locations", params={"format": format_, "limit": 2}, headers={"Accept-Encoding": "identity"}
        )
        assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
        assert answer.headers["content-disposition"] == f'attachment; filename="user_locations.{format_}"'
        assert len(answer.content) == int(answer.headers["content-length"]) > 0


def test_sixteen_clients_at_once_are_all_served(served: httpx.Client) -> None:
    rows = fresh(EVENTS, 600)

    def client(number: int) -> dict[str, Any]:
        sent = rows[number * 20 : number * 20 + 280]
        answer = post(served, "events-part", sent[::-1] if number % 2 else sent)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(client, range(16)))
    ids = [each for answer in answers for each in answer["inserted_ids"]]
    assert len(ids) == len(set(ids)) == sum(answer["count"] for answer in answers) == 580
    assert sum(answer["count"] + answer["skipped"] for answer in answers) == 16 * 280


def test_other_methods_are_told_the_right_ones(served: httpx.Client) -> None:
    for method in ("PUT", "OPTIONS", "QUERY"):
        refused = served.request(method, "/dwh/events-part")
        assert (refused.status_code, refused.headers["allow"]) == (405, "DELETE, GET, HEAD, POST")


def test_readiness_tells_of_the_warehouse(served: httpx.Client) -> None:
    for _ in range(100):
        ready = served.get("/ready").json()
        if ready["ready"]:
            break
    assert ready["checks"]["dwh_connected"] is True


def test_the_document_names_every_table_and_its_scopes(served: httpx.Client) -> None:
    paths = served.get("/openapi.json").json()["paths"]
    for table in TABLES:
        operations = paths[f"/dwh/{table.path}"]
        assert (operations["get"]["x-scope"], operations["post"]["x-scope"]) == ("dwh:read", "dwh:write")
        schema = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert list(schema["properties"]["data"]["items"]["properties"]) == list(table.names)
