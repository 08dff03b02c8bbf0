"""Both pulls at their edges: a destination that refuses an hour, a row or everything, or forgets; a silent source."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from app.core.errors import AppError, Permanent, Rejected, Transient
from app.core.ledger import fault_of
from app.core.verify import CellState
from app.core.windows import Window
from app.dwh.tables import TABLES
from app.object_store.port import ObjectStore, PutRequest
from app.product_events.hours import KEEPS_FAILING, REFUSED
from app.product_events.mapping import Tables
from pulling import HOUR, START, Landed, Pull, pulling
from simulators.amplitude import AmplitudeFault, AmplitudeSimulator, amplitude_events
from simulators.appmetrica import AppMetricaFault, AppMetricaSimulator, appmetrica_rows

DAY = timedelta(days=1)
FIRST = START - 12 * HOUR
ROWS = 3
SETTLED = timedelta(hours=3)  # hours of both services can be asked for by then


class RefusingStore:
    """A store that raises `fault` for keys in which one of `parts` stands, except for what is set aside."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.parts: tuple[str, ...] = ()
        self.fault: AppError = Permanent("403 Forbidden", "allow it")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, key: str, body: BinaryIO, put: PutRequest) -> str:
        if any(part in key for part in self.parts) and "/_set_aside/" not in key:
            raise self.fault
        return self._store.put(key, body, put)


class RefusingWarehouse:
    """A warehouse that raises `fault` when one of these events is loaded, or any when `uuids` is None."""

    def __init__(self, warehouse: Any) -> None:
        self._warehouse = warehouse
        self.uuids: set[str] | None = set()
        self.fault: AppError = Permanent("new row violates a check of the owner's", "change it")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._warehouse, name)

    def load(self, chunks: Iterable[Tables], *, past: bool) -> int:
        held = list(chunks)
        rows = [row[0] for chunk in held for row in chunk["events_part"].rows]
        if rows and (self.uuids is None or self.uuids & set(rows)):
            raise self.fault
        return int(self._warehouse.load(held, past=past))


@dataclass
class World:
    """One service with ROWS events in each hour from FIRST on."""

    made: Landed
    simulator: AmplitudeSimulator | AppMetricaSimulator
    store: RefusingStore
    warehouse: RefusingWarehouse
    partition: str
    key: Callable[[int], str]

    @property
    def name(self) -> str:
        return "amplitude" if self.partition == "web" else "appmetrica"

    def pull(self) -> Pull:
        if isinstance(self.simulator, AmplitudeSimulator):
            return self.made.amplitude(self.simulator)
        return self.made.appmetrica(self.simulator)

    def run(self) -> Any:
        return self.pull().to_the_end()

    def uuids(self) -> set[str]:
        return {str(row["uuid"]) for row in self.made.rows("events_part")}

    def gaps(self) -> Mapping[int, CellState]:
        cells = self.pull().chart.cells(self.partition, Window(FIRST, START - SETTLED))
        return {(c.window.start - FIRST) // HOUR: c.state for c in cells if c.state is not CellState.EQUAL}

    def cursor(self) -> Any:
        return self.made.state.checkpoints.cursors(self.name)[self.partition]


@pytest.fixture(params=["amplitude", "appmetrica"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with pulling(tmp_path) as (made, web, mobile):
        hours = [FIRST + number * HOUR for number in range(60)]
        simulator: AmplitudeSimulator | AppMetricaSimulator = web
        partition, key = "web", lambda number: f"hours/{FIRST + number * HOUR:%Y-%m-%d/%H}."
        if request.param == "amplitude":
            web.state.events.update({("web", at): list(amplitude_events("web", at, ROWS)) for at in hours})
        else:
            held = {at: list(appmetrica_rows(1234567, at, ROWS - 1)) for at in hours}
            simulator, mobile.state.rows, mobile.state.questions = mobile, lambda at: held.get(at, ()), 0
            partition, key = "1234567:events", lambda number: f"{FIRST + number * HOUR:%Y-%m-%d/1234567_%H%M%S}"
            made.clock.now += timedelta(minutes=20)
        store, warehouse = RefusingStore(made.store), RefusingWarehouse(made.warehouse)
        made.store, made.warehouse = store, warehouse  # type: ignore[assignment]  # the ports, with faults
        yield World(made, simulator, store, warehouse, partition, key)


@pytest.mark.parametrize(
    "fault",
    [
        Permanent("403", "allow it"),
        pytest.param(Transient("500", "wait"), marks=pytest.mark.slow),
        pytest.param(Rejected("too long", "cut"), marks=pytest.mark.slow),
    ],
)
def test_an_object_that_the_store_refuses_holds_up_no_other_hour_and_lands_once_it_may(
    world: World, fault: AppError
) -> None:
    world.store.parts, world.store.fault = (world.key(5),), fault
    report = world.run()
    assert [(each.message, f"{FIRST + 5 * HOUR:%dT%H}" in each.partition) for each in report.failures] == [
        (fault.message, True)
    ]
    assert (report.ledger.closes, report.ledger.total.waiting) == (True, ROWS)
    assert world.gaps() == {5: CellState.MISSING}
    assert world.cursor() == world.pull().pipeline.due_at
    cursor = world.cursor()
    world.made.clock.now += HOUR
    report = world.run()
    assert (len(report.failures), report.ledger.closes, world.cursor()) == (1, True, cursor + HOUR)
    world.store.parts = ()
    report = world.run()
    assert (report.failures, fault_of(report.ledger), world.gaps()) == ((), None, {})
    assert world.made.signs(world.pull().verification, Window(FIRST, START - SETTLED)) == {}


@pytest.mark.slow
def test_an_hour_that_the_store_refuses_for_a_day_is_set_aside_and_a_backfill_lands_it(world: World) -> None:
    world.store.parts = (world.key(5),)
    world.run()
    world.made.clock.now += DAY + HOUR
    report = world.run()
    assert {one.reason: one.new for one in report.ledger.newly_set_aside} == {KEEPS_FAILING: ROWS}
    assert (report.failures, report.ledger.closes) == ((), True)
    assert len(world.made.objects(f"{world.name}/_set_aside/")) == 1
    world.made.clock.now += HOUR
    assert (world.run().failures, world.gaps()) == ((), {5: CellState.MISSING})
    world.store.parts = ()
    assert not world.pull().fill(FIRST, START - SETTLED).failures
    assert world.gaps() == {}


@pytest.mark.slow
def test_a_day_that_the_store_refuses_holds_up_no_other_day(world: World) -> None:
    world.store.parts = (f"{START - DAY:%Y-%m-%d}/",)
    report = world.run()
    assert len(report.failures) == 6
    assert world.cursor() == world.pull().pipeline.due_at
    assert set(world.gaps()) == set(range(6))


@pytest.mark.slow
def test_a_destination_that_takes_nothing_is_a_failure_of_the_run_and_nothing_is_recorded(world: World) -> None:
    world.store.parts = (f"{world.name}/",)
    (failure,) = world.run().failures
    assert (failure.partition, failure.message) == (world.partition, "403 Forbidden")
    world.store.parts, world.warehouse.uuids = (), None
    (failure,) = world.run().failures
    assert failure.message == world.warehouse.fault.message
    assert world.cursor() <= FIRST
    assert not [key for key in world.made.objects(f"{world.name}/") if "/hours/" in key or "/date=" in key]
    world.warehouse.uuids = set()
    report = world.run()
    assert (report.failures, report.ledger.closes, world.gaps()) == ((), True, {})


@pytest.mark.parametrize(
    "fault",
    [
        Permanent("a check of the owner's", "change it"),
        pytest.param(Rejected("too long", "cut it"), marks=pytest.mark.slow),
    ],
)
def test_an_event_that_the_warehouse_refuses_is_set_aside_alone(world: World, fault: AppError) -> None:
    world.run()
    uuids = world.uuids()
    refused = min(uuids)
    with world.made.warehouse.database.transaction() as session:
        session.run("DELETE FROM events_part WHERE uuid = :uuid", uuid=refused)
    world.warehouse.uuids, world.warehouse.fault = {refused}, fault
    for new in (1, 0):
        report = world.pull().fill(FIRST, START)
        assert {one.reason: (one.number, one.new) for one in report.ledger.set_aside} == {REFUSED: (1, new)}
        assert (report.failures, report.ledger.closes) == ((), True)
        assert world.uuids() == uuids - {refused}
        (body,) = world.made.objects(f"{world.name}/_set_aside/").values()
        assert len(body.splitlines()) == 1 or world.name == "appmetrica"
        assert list(world.gaps().values()) == [CellState.PARTIAL]
    world.warehouse.uuids = set()
    assert not world.pull().fill(FIRST, START).failures
    assert (world.uuids(), world.gaps()) == (uuids, {})


@pytest.mark.slow
@pytest.mark.parametrize("kept_hours", [0, 5])
def test_a_warehouse_that_was_emptied_or_restored_from_a_backup_gets_its_rows_again(
    world: World, kept_hours: int
) -> None:
    backup = set()
    if kept_hours:
        world.made.clock.now -= kept_hours * HOUR
        world.run()
        backup = world.uuids()
        world.made.clock.now += kept_hours * HOUR
    world.run()
    before, objects = world.made.tables(), world.made.objects()
    with world.made.warehouse.database.transaction() as session:
        for table in () if kept_hours else TABLES:
            session.run(f"DELETE FROM {table.name}")  # noqa: S608 - declared names
        for uuid in world.uuids() - backup:
            session.run("DELETE FROM events_part WHERE uuid = :uuid", uuid=uuid)
    world.warehouse.uuids = None
    assert world.pull().run().failures, "it is noticed first, and nothing new is pulled before that"
    world.warehouse.uuids = set()
    report = world.run()
    assert (report.rows, report.failures, report.ledger.closes) == (len(before["events_part"]) - len(backup), (), True)
    assert any("were not in the warehouse" in note for note in report.notes)
    assert (world.made.tables(), world.made.objects()) == (before, objects)
    report = world.run()
    assert (report.rows, report.notes) == (0, ())


def test_an_event_that_an_emptied_warehouse_refuses_is_set_aside_alone(world: World) -> None:
    world.run()
    uuids = world.uuids()
    with world.made.warehouse.database.transaction() as session:
        for table in TABLES:
            session.run(f"DELETE FROM {table.name}")  # noqa: S608 - declared names
    world.warehouse.uuids = {min(uuids)}
    report = world.run()
    assert (world.uuids(), report.rows) == (uuids - world.warehouse.uuids, len(uuids) - 1)
    assert {one.reason: one.number for one in report.ledger.newly_set_aside} == {REFUSED: 1}
    assert report.ledger.closes


def test_an_hour_that_an_emptied_warehouse_refuses_keeps_no_other_out(world: World) -> None:
    world.made.clock.now = FIRST + 4 * HOUR
    world.run()
    oldest = world.uuids()
    world.made.clock.now = START + timedelta(minutes=20)
    world.run()
    uuids = world.uuids()
    with world.made.warehouse.database.transaction() as session:
        session.run("DELETE FROM events_part")
    world.warehouse.uuids = oldest
    world.made.clock.now += HOUR
    report = world.run()
    assert {failure.message for failure in report.failures} == {world.warehouse.fault.message}
    assert all(f"python -m app backfill {world.name} --from 2026-02-1" in each.hint for each in report.failures)
    assert uuids - world.uuids() == oldest
    assert world.uuids() - uuids, "what is new is pulled as well"
    assert world.run().failures == ()


def test_an_event_that_the_warehouse_lost_is_named_by_verify_and_loaded_again(world: World) -> None:
    world.run()
    pull, span = world.pull(), Window(FIRST, START - SETTLED)
    before, objects = world.made.tables(), {info.key: info.etag for info in world.made.store.list("")}
    with world.made.warehouse.database.transaction() as session:
        lost = str(before["events_part"][4]["uuid"])
        session.run("DELETE FROM events_part WHERE uuid = :uuid", uuid=lost)
    assert list(world.made.signs(pull.verification, span).values()) == ["!"]
    _, told = world.made.mend(world.name, pull.verification, span)
    assert [(each.healed, each.slot.partition) for each in told] == [(True, world.partition)]
    assert world.made.tables() == before
    assert {info.key: info.etag for info in world.made.store.list("")} == objects, "an object that is whole stays"


@pytest.mark.slow
def test_hours_whose_objects_are_gone_as_well_are_named_with_the_command_that_brings_them(world: World) -> None:
    world.run()
    with world.made.warehouse.database.transaction() as session:
        session.run("DELETE FROM events_part")
    keys = [key for key in world.made.objects(f"{world.name}/") if world.key(3) in key or world.key(4) in key]
    world.made.put(keys[0], None)
    world.made.put(keys[1], b"damaged")
    (failure,) = world.run().failures
    assert failure.message.startswith("2 hours since")
    assert failure.hint.startswith(f"python -m app backfill {world.name} --from 20")
    assert not world.pull().fill(FIRST, START).failures
    assert world.made.signs(world.pull().verification, Window(FIRST, START - SETTLED)) == {}


@pytest.mark.slow
def test_a_source_that_never_gave_a_row_or_gives_none_any_more_is_noted_and_no_failure(world: World) -> None:
    simulator = world.simulator
    if isinstance(simulator, AmplitudeSimulator):
        held = dict(simulator.state.events)
        simulator.state.events.clear()
    else:
        rows, simulator.state.rows = simulator.state.rows, lambda _hour: ()
    world.made.clock.now += 2 * DAY
    report = world.run()
    assert (report.failures, fault_of(report.ledger)) == ((), None)
    assert any(f"{world.partition} has returned no row since" in note for note in report.notes)
    (system,) = world.pull().pipeline.checks
    assert "right project" in system.check()
    if isinstance(simulator, AmplitudeSimulator):
        simulator.state.events.update(held)
    else:
        simulator.state.rows = rows
        simulator.state.builds.clear()
    world.pull().fill(START - DAY, START + 2 * DAY)
    assert not world.run().notes
    assert "right project" not in system.check()


@pytest.mark.slow
@pytest.mark.parametrize("status", [400, 413])
def test_what_is_too_long_for_the_service_is_asked_for_in_pieces(world: World, status: int) -> None:
    simulator = world.simulator
    if isinstance(simulator, AmplitudeSimulator):
        simulator.state.limit_hours, simulator.state.limit_status = 7, status
    else:
        simulator.add_fault(AppMetricaFault())  # the time zone
        simulator.add_fault(AppMetricaFault(status, b"The period is too long"))
    for _ in range(30):
        world.pull().run()
    assert (world.gaps(), len(world.uuids())) == ({}, ROWS * ((world.pull().pipeline.due_at - FIRST) // HOUR))


@pytest.mark.slow
def test_a_queue_that_is_full_for_days_sets_nothing_aside(tmp_path: Path) -> None:
    with pulling(tmp_path) as (made, _, simulator):
        simulator.state.rows = lambda at: appmetrica_rows(1234567, at, 1)
        simulator.state.others = 3
        made.clock.now += timedelta(minutes=20)
        for _ in range(8):
            report = made.appmetrica(simulator).run()
            made.clock.now += 12 * HOUR
        assert "no file of" in report.failures[0].message
        simulator.state.others = 0
        pull = made.appmetrica(simulator)
        assert not pull.to_the_end().failures
        assert not made.objects("appmetrica/_set_aside/")
        assert len(made.rows("events_part")) == 2 * ((pull.pipeline.due_at - START + DAY + HOUR) // HOUR)


@pytest.mark.slow
def test_a_week_that_cannot_be_stored_holds_up_no_other_week(tmp_path: Path) -> None:
    with pulling(tmp_path) as (made, simulator, _):
        store = RefusingStore(made.store)
        made.store = store
        for at in (START - 12 * DAY, START - 3 * DAY):
            simulator.state.events["web", at] = list(amplitude_events("web", at, ROWS))
        store.parts = ("_week_6.zip",)
        pull = made.amplitude(simulator, lookback_days=14)
        for _ in range(2):
            (failure,) = pull.to_the_end().failures
            assert failure.partition.startswith("web:weeks 2026-02-02")
        assert "amplitude/web/2026_week_7.zip" in made.objects("amplitude/web/")
        store.parts = ()
        assert not pull.run().failures
        simulator.add_fault(AmplitudeFault(429), times=9)
        made.clock.now += HOUR
        assert "429" in pull.run().failures[0].message
