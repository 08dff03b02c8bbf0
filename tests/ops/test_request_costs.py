"""Counted requests, what they cost a month, and the table of prices."""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.core.errors import Permanent, Transient
from app.core.runs import current_run
from app.db.database import NamedQueries, sql_directory
from app.db.state import RequestCounts, SqlRequestCounts, State
from app.object_store.request_counts import RequestCounter, kind_of
from app.ops.request_costs import RequestCosts, estimate, load_prices, rewrite_seconds

NOW = datetime(2026, 2, 1, 12, 30, tzinfo=UTC)
MONTH = 30.4375 * 86_400
PUT_PRICE = 0.005 / 1000


def test_operations_have_the_price_class_that_s3_charges() -> None:
    classes = {
        "put": ("PutObject", "CopyObject", "CreateMultipartUpload", "UploadPart", "UploadPartCopy"),
        "list": ("ListObjectsV2", "ListMultipartUploads"),
        "get": ("GetObject", "HeadObject", "GetObjectTagging"),
        "delete": ("DeleteObject", "AbortMultipartUpload"),
    }
    assert {kind: {kind_of(name) for name in names} for kind, names in classes.items()} == {
        kind: {kind} for kind in classes
    }


def test_requests_are_counted_for_their_run_and_in_all() -> None:
    counter = RequestCounter()
    counter.add("list")
    token = current_run.set("r1")
    counter.add("put", 2)
    counter.add_elsewhere({"put": 3, "get": 1})  # a worker charges those itself
    current_run.reset(token)
    assert (counter.take_run("r1"), counter.take_run("r1")) == ({"put": 5, "get": 1}, {})
    assert counter.take() == {"list": 1, "put": 2}


def test_a_thousand_puts_a_minute_cost_what_the_price_list_says() -> None:
    found = estimate(RequestCounts({"put": 60_000, "get": 12_000}, 3600), load_prices("", "us-east-1"))
    assert found.by_kind["put"] == pytest.approx(1000 * MONTH / 60)
    assert found.cost == pytest.approx(1000 * MONTH / 60 * 0.005 / 1000 + 200 * MONTH / 60 * 0.0004 / 1000)
    assert found.text().startswith(
        "222.66 USD a month at this rate: 43,830,000 PUT, 8,766,000 GET (counted over 1:00:00;"
    )


def test_the_first_hour_says_nothing_of_a_month() -> None:
    text = estimate(RequestCounts({"put": 10_000}, 3599), load_prices("", "us-east-1")).text()
    assert text == "not yet known: requests have been counted for less than an hour"


def test_a_region_without_prices_has_those_of_the_default_region_and_says_so() -> None:
    assert load_prices("", "mars-north-1").region == "us-east-1"
    assert "prices of us-east-1" in estimate(RequestCounts({"put": 1}, 3600), load_prices("", "mars-north-1")).text()


def test_another_store_than_aws_has_counts_only() -> None:
    found = estimate(RequestCounts({"put": 10, "list": 1}, 86_400), None)
    assert found.cost is None
    assert "REQUEST_PRICES_FILE" in found.text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a price table"),
        ("[]", "is not a price table"),
        ('{"regions": {}}', "has no 'default_region'"),
        ('{"date": "x", "currency": "EUR", "default_region": "r", "regions": {"r": {"put": 1}}}', "has no 'list'"),
        (
            """{"date": "x", "currency": "EUR", "default_region": "r", "regions":
            {"r": {"put": -1, "list": 0, "get": 0, "delete": 0, "read_unit": 0}}}""",
            "below 0",
        ),
        (
            """{"date": "x", "currency": "EUR", "default_region": "r", "regions":
            {"r": {"put": NaN, "list": 0, "get": 0, "delete": 0, "read_unit": 0}}}""",
            "without end",
        ),
    ],
)
def test_a_price_file_that_is_not_one_is_refused_with_what_is_wrong(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "prices.json"
    path.write_text(content)
    with pytest.raises(Permanent, match=said):
        load_prices(str(path), "r")


def test_prices_of_a_file_hold_for_its_region(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    each = {"put": 0.01, "list": 0.02, "get": 0.03, "delete": 0, "read_unit": 0.04}
    path.write_text(
        json.dumps({"date": "2026", "currency": "EUR", "default_region": "a", "regions": {"a": {}, "b": each}})
    )
    assert load_prices(str(path), "b").of({"put": 2, "list": 1}) == pytest.approx(0.04)


@pytest.fixture(params=["sqlite", "postgres"])
def state(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> State:
    return new_state(request.param)


class Clock:
    """An instant that a test moves."""

    def __init__(self) -> None:
        self.at = NOW

    def __call__(self) -> datetime:
        return self.at


def test_counts_of_several_processes_are_added_and_outlive_them(state: State) -> None:
    clock = Clock()
    counters = [RequestCounter(), RequestCounter()]
    costs = [RequestCosts(counter, state.requests, load_prices("", "us-east-1"), clock) for counter in counters]
    for counter in counters:
        counter.add("put", 100)
        counter.add("read_unit", 0.5)
    clock.at += timedelta(minutes=10)
    for each in costs:
        each.save()
        each.save()
    later = RequestCosts(RequestCounter(), state.requests, load_prices("", "us-east-1"), clock)
    assert later.estimate().span_seconds == 600
    assert later.estimate().by_kind == {
        "put": pytest.approx(200 * MONTH / 600),
        "read_unit": pytest.approx(MONTH / 600),
    }


def test_hours_of_a_clock_that_was_ahead_do_not_count(state: State) -> None:
    ahead = NOW + timedelta(days=3)
    state.requests.add({"put": 1_000_000}, ahead, ahead + timedelta(minutes=1))
    state.requests.add({"put": 7}, NOW - timedelta(minutes=10), NOW)
    assert state.requests.recent(NOW).by_kind == {"put": 7}


def test_old_hours_go_when_new_ones_come(state: State) -> None:
    for days in (40, 0):
        at = NOW - timedelta(days=days)
        state.requests.add({"put": 1}, at, at)
    with state.database.transaction(read_only=True) as session:
        assert session.rows("SELECT count(*) AS hours FROM request_counts")[0]["hours"] == 1


def test_a_tenth_of_the_cost_lets_a_window_be_written_every_twelfth_minute_and_closed_as_before() -> None:
    minutely = 1000 * MONTH * PUT_PRICE * (1 / 60 + 1 / 3600)
    seconds = rewrite_seconds(1000, 3600, put_price=PUT_PRICE, monthly=minutely / 10)
    assert seconds == pytest.approx(3600 / 5.1)
    puts = 3600 // (-(-seconds // 60) * 60) + 1
    assert 61 / puts > 9


@pytest.mark.parametrize("monthly", [0.0, -5.0, 1000 * MONTH * PUT_PRICE / 3600])
def test_a_window_is_written_once_in_its_length_whatever_that_costs(monthly: float) -> None:
    assert rewrite_seconds(1000, 3600, put_price=PUT_PRICE, monthly=monthly) == 3600


def test_without_devices_nothing_has_to_wait() -> None:
    assert rewrite_seconds(0, 3600, put_price=PUT_PRICE, monthly=1.0) == 0


def test_a_limit_without_prices_stops_the_start(state: State) -> None:
    with pytest.raises(Permanent, match="MAX_MONTHLY_REQUEST_COST is set, and no prices"):
        RequestCosts(RequestCounter(), state.requests, None, Clock(), 10.0)


def test_what_other_requests_cost_is_taken_from_the_limit(state: State) -> None:
    state.requests.add({"get": 1e6, "put": 1e6}, NOW - timedelta(seconds=MONTH / 100), NOW)
    costs = RequestCosts(RequestCounter(), state.requests, load_prices("", "us-east-1"), Clock(), 140.0)
    left = 140.0 - 1e8 * 4e-7
    assert costs.rewrite_seconds(1000, 3600) == pytest.approx(
        rewrite_seconds(1000, 3600, put_price=PUT_PRICE, monthly=left)
    )


def test_a_command_that_ends_at_once_is_counted_too(state: State) -> None:
    clock, counter = Clock(), RequestCounter()
    costs = RequestCosts(counter, state.requests, load_prices("", "us-east-1"), clock)
    counter.add("put", 3)
    clock.at += timedelta(seconds=2)
    costs.save()
    assert state.requests.recent(clock()) == RequestCounts({"put": 3}, 2.0)


class Away(SqlRequestCounts):
    """A state that cannot be reached while `is_away`."""

    is_away = True

    def add(self, by_kind: Mapping[str, float], first_at: datetime, last_at: datetime) -> None:
        if self.is_away:
            raise Transient("the state is away", "wait")
        super().add(by_kind, first_at, last_at)


def test_counts_wait_while_the_state_is_away_and_keep_their_span(state: State) -> None:
    clock, counter = Clock(), RequestCounter()
    stored = Away(NamedQueries(state.database, sql_directory() / "state"))
    costs = RequestCosts(counter, stored, load_prices("", "us-east-1"), clock)
    counter.add("put", 3)
    clock.at += timedelta(seconds=30)
    costs.save()
    stored.is_away = False
    clock.at += timedelta(seconds=30)
    costs.save()
    assert state.requests.recent(clock()) == RequestCounts({"put": 3}, 60.0)
