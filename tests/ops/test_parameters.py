"""Query parameters that a route does not declare, and those that are given twice."""

import asyncio
from typing import Annotated

import pytest
from fastapi import APIRouter, Query, Request

from app.web.api import refuse_unknown_parameters
from app.web.errors import Refused

router = APIRouter()


@router.get("/x", openapi_extra={"parameters": [{"name": "format", "in": "query"}, {"name": "Prefer", "in": "header"}]})
def look(key: str, end: Annotated[int, Query(alias="to")] = 0) -> None:
    """Takes `key`, `to` and, read by hand, `format`."""


def check(query: bytes) -> None:
    scope = {"type": "http", "route": router.routes[0], "query_string": query, "headers": []}
    asyncio.run(refuse_unknown_parameters(Request(scope)))


def test_what_a_route_declares_is_taken_once() -> None:
    check(b"")
    check(b"key=%C3%BC+x&to=1&format=csv")


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        (b"key=a&ofset=5", "ofset"),
        (b"key=a&Key=b", "Key"),
        (b"key=a&end=1", "end"),
        (b"key=a&Prefer=1", "Prefer"),
        (b"key=a&key=b", "key"),
        (b"key=a&k%65y=a", "key"),
        (b"key=&x=1&key=", "key"),
        (b"format=csv&format=csv", "format"),
        (b"key=a&" + b"x" * 200, "x" * 80),
    ],
)
def test_a_parameter_that_is_given_twice_or_not_known_is_refused_by_name(query: bytes, fault: str) -> None:
    with pytest.raises(Refused) as refused:
        check(query)
    assert (refused.value.refusal.status, refused.value.refusal.fault) == (422, fault)
