"""One window under every interleaving: the product's own passes, one effect at a time, each state looked at once.

A pass knows nothing but what its ports answered. So a paused or crashed process is the list of these answers: to go on,
the pass is run again with them, up to its next effect. Effects are taken on a world of plain values: what the source
holds, the object, the state (record and cursor), and a delta that an older version wrote. A person may delete the
object, which a reconcile then heals. Not modelled: the lease, which saves work only, and reading only the tail of a
window.

Each rule of the protocol is left out once, in a port or a setting, and must then break what it is there for:
a a row stands twice. b an object goes back to rows read before those that it replaces. k it goes back behind a state
that a later pass had confirmed. v a row vanishes. d a closed window lacks what the source had when it fell due.
c with all others dead, one reconcile does not make the object equal to the source. q a second one still finds work.
n a write that changes nothing, by a pass that closes nothing.
"""

import gc
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

import pytest

from app.core.errors import Conflict, Transient
from app.core.ledger import Tally
from app.core.pipeline import Commit, Count, Objects, ObjectState, Pipeline, Position, Record, Shrink, Sums
from app.core.repair import reconcile
from app.core.runs import Lease
from app.core.sync import sync_partition
from app.core.windows import Window
from effort import EFFORT
from world import (
    GRACE_SECONDS,
    START,
    VALUE,
    WINDOW_SECONDS,
    Bytes,
    Process,
    Row,
    Rows,
    World,
    context,
    digest_of,
    sums_of,
)

WINDOW = Window(START, START + timedelta(seconds=WINDOW_SECONDS))
DUE_AT = WINDOW.end + timedelta(seconds=GRACE_SECONDS)
CONTEXT = context()
KEY = "p/20260207T220000.0"
DELTA = "p/20260207T220000.1"
Values = tuple[int, ...]
"""The value of each row, 0 where it is absent."""

# What the source holds, one state after the other: a late row and then a correction; both, and then taken back; a row
# that the source forgets, and a correction; one row goes while another comes.
LATE, BACK = ((1, 0), (1, 1), (2, 1)), ((1, 0), (2, 1), (1, 0))
GONE = ((1, 1), (1, 0), (2, 0))
SWAP = ((1, 2), (2, 1))  # two values are exchanged, so that counts and sums stay


@dataclass(frozen=True)
class Rules:
    """What is tried, and the rule that is left out. `restores`: how often the state is set back or lost.
    `vanishes`: how often a person deletes the object.

    `begun`: nothing is there at first; "open": an object confirmed while its window was open; "delta": a window
    that is closed, whose second row an older version wrote to a delta.
    """

    history: tuple[Values, ...] = LATE
    begun: str = ""
    passes: int = 2
    restores: int = 0
    lost_answers: int = 0
    vanishes: int = 0
    left_out: str = ""


class Noted(NamedTuple):
    """A record."""

    version: str
    digest: str
    rows: int
    cells: int
    is_closed: bool
    source_digest: str
    sums: tuple[tuple[str, Sums], ...] = ()


class State(NamedTuple):
    record: Noted | None = None
    is_past: bool = False  # the cursor is after the window


class Object(NamedTuple):
    """`read_at`: the state of the source that it was made from; `confirmed_at`: the latest that a commit knew it by."""

    version: str
    rows: tuple[Row, ...]
    write: str
    folded: int
    read_at: int
    confirmed_at: int


class Model(NamedTuple):
    source: int = 0
    due: int | None = None
    object: Object | None = None
    delta: tuple[Row, ...] | None = None
    state: State = State()
    was_closed: bool = False


class Who(NamedTuple):
    """A pass. `source` is what the source held when it began, which nothing but a variant asks."""

    number: int
    kind: str
    is_past: bool
    source: int = 0


Log = tuple[tuple[str, Any], ...]
Request = tuple[Any, ...]


class Waits(BaseException):
    """The pass wants this effect next."""

    def __init__(self, *request: Any) -> None:
        self.request = request


def rows_of(values: Values) -> tuple[Row, ...]:
    return tuple((START + timedelta(minutes=n), str(value)) for n, value in enumerate(values) if value)


class Pass(Process):
    """The ports of one pass: what they answered before, then `Waits`."""

    def __init__(self, rules: Rules, who: Who, log: Log) -> None:
        super().__init__(World(), shrink=Shrink if rules.left_out == "unite" else None)
        self.rules, self.who, self.answers, self.writes = rules, who, iter(log), 0
        self.recorded: Noted | None = None

    def ask(self, *request: Any) -> Any:
        _, answer = next(self.answers, (None, Waits(*request)))
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def counts(self, partition: str | None, spans: Sequence[Window]) -> Mapping[tuple[str, Any], Count]:
        return {("p", WINDOW.start): count_of(self.ask("counts"))}

    def read(self, partition: str, window: Window, count: Count, kept: Rows | None) -> Rows:
        _, rows = self.ask("read")
        return self._batch(rows, Tally(counted=len(rows), read=len(rows), new=len(rows)))

    def union(self, batch: Rows, held: Sequence[Iterable[Row]], shrink: Shrink | None = None) -> Rows:
        united = super().union(batch, held, shrink)
        if self.rules.left_out == "source wins":
            united.held = tuple(sorted({**dict(united.held), **dict(row for rows in held for row in rows)}.items()))
        if self.rules.left_out == "identity":
            united.held = tuple(sorted({*batch.held, *(row for rows in held for row in rows)}))
        return united

    def encode(self, partition: str, window: Window, batch: Rows, *, summarises: bool = True) -> Bytes:
        self.writes += 1
        return Bytes(batch.held, batch.digest, f"{self.who.number}.{self.writes}")

    def head(self, key: str) -> ObjectState | None:
        held: ObjectState | None = self.ask("head", key)
        return held

    def read_object(self, key: str, version: str) -> tuple[Row, ...]:
        rows: tuple[Row, ...] = self.ask("get", key, version)
        return rows

    def put(self, key: str, encoded: Bytes, expected: str | None, *, closing: bool = False) -> str:
        return str(self.ask("put", encoded.content, encoded.write, encoded.folded, expected))

    def objects(self, partition: str, windows: Sequence[Window]) -> Mapping[datetime, Objects]:
        listed: Objects = dict(self.ask("objects"))
        if self.rules.left_out == "listing" and self.recorded:
            listed = {0: (KEY, self.recorded.version)}
        return {WINDOW.start: listed} if listed else {}

    def asked(
        self, partition: str, windows: Sequence[Window], numbers: Collection[str]
    ) -> Mapping[datetime, Mapping[str, Sums]]:
        sums = dict(self.ask("sums"))
        return {WINDOW.start: sums} if sums else {}

    def delete(self, key: str) -> None:
        self.ask("delete")

    def records(self, pipeline: str, partition: str, since: Any, until: Any) -> Sequence[Record]:
        noted = self.recorded = self.ask("records") if since <= WINDOW.start < until else None
        return [record_of(self.rules, noted)] if noted else []

    def commit(self, pipeline: str, partition: str, commit: Commit, lease: Lease) -> None:
        for record in commit.records:
            source = record.digest if self.rules.left_out == "two digests" else record.source_digest
            sums = tuple(sorted(record.sums.items()))
            noted = Noted(record.version, record.digest, record.rows, record.source_cells, record.closed, source, sums)
            self.ask("commit", noted, commit.cursor_at is not None)

    def mark(self, pipeline: str, partition: str, troubles: Sequence[tuple[Record, str]]) -> None:
        """No rule goes by what is noted for people."""

    def note_undeleted(self, pipeline: str, key: str, error: str) -> None:
        """Nor by this."""

    def pipeline(self) -> Pipeline[Rows, Bytes]:
        pipeline = super().pipeline()
        return replace(pipeline, by_digest=True) if self.rules.left_out == "closing writes" else pipeline


def count_of(number: int) -> Count:
    return Count(number, number, {VALUE: number})


def record_of(rules: Rules, noted: Noted) -> Record:
    return Record(
        window=WINDOW,
        part=0,
        key=KEY,
        version=noted.version,
        digest="" if rules.left_out == "same rows" else noted.digest,
        rows=many(rules, noted.rows),
        size_bytes=1,
        source_cells=noted.cells,
        min_at=None,
        max_at=None,
        closed=noted.is_closed,
        source_digest="" if rules.left_out == "same rows" else noted.source_digest,
        sums=dict(noted.sums),
    )


def many(rules: Rules, rows: int) -> int:
    """Closing without a write is the way of a sink whose digest is the checkpoint; what it replaces is united here."""
    return rows + 99 if rules.left_out == "closing writes" else rows


@cache
def next_effect(rules: Rules, who: Who, log: Log) -> Request | None:
    """What the pass does after these answers; None when it has ended."""
    process = Pass(rules, who, log)
    cursor_at = WINDOW.end if who.is_past else WINDOW.start
    try:
        if who.kind == "reconcile":
            reads = WINDOW if rules.left_out != "content" else None
            reconcile(
                process.pipeline(),
                CONTEXT,
                "p",
                WINDOW,
                DUE_AT,
                done=lambda _: None,
                asked=process.asked,
                by_content=reads,
                heals=rules.vanishes > 0,
            )
        else:
            now = DUE_AT if who.kind == "close" else WINDOW.start + timedelta(minutes=5)
            live = {WINDOW.start: process.counts("p", ())["p", WINDOW.start]} if who.kind == "live" else {}
            sync_partition(process.pipeline(), CONTEXT, Position("p", cursor_at, now), live, lambda _: None)
    except Waits as waits:
        return waits.request
    except Transient:
        return None
    return None


Outcome = tuple[str, Model, Any, str]
"""What happened, the world after it, what the pass is answered, and what it broke."""


def outcomes(rules: Rules, world: Model, who: Who, log: Log, request: Request) -> Iterator[Outcome]:
    name, there = request[0], world.object
    if name == "read":
        yield name, world, read(rules, world, who, log), ""
    elif name in ("counts", "records", "objects", "sums"):
        yield name, world, answer(rules, world, name), ""
    elif name == "head":
        yield name, world, held_of(rules, world, request[1]), ""
    elif name == "get":
        held = held_of(rules, world, request[1])
        is_there = held is not None and held.version == request[2]
        rows = world.delta if request[1] == DELTA else there and there.rows
        yield name, world, rows if is_there else Conflict(request[1]), ""
    elif name == "put":
        yield from put(rules, world, who, log, request)
    elif name == "delete":
        yield name, world._replace(delta=None), None, ""
    elif name == "commit":
        noted, moves = request[1:]
        state = State(noted, world.state.is_past or moves)
        if there and there.version == noted.version:
            there = there._replace(confirmed_at=max(there.confirmed_at, read_at(log)))
        closed = world.was_closed or noted.is_closed
        yield name, world._replace(state=state, object=there, was_closed=closed), None, ""


def read(rules: Rules, world: Model, who: Who, log: Log) -> tuple[int, tuple[Row, ...]]:
    """What the source answers, and which of its states that is."""
    before: tuple[int, tuple[Row, ...]] | None = next((answer for name, answer in log if name == "read"), None)
    if rules.left_out == "read again" and before:
        return before
    at = who.source if rules.left_out == "version first" and not before else world.source
    return at, rows_of(rules.history[at])


def held_of(rules: Rules, world: Model, key: str) -> ObjectState | None:
    if key == DELTA:
        return ObjectState("old delta", "old delta", 1) if world.delta is not None else None
    there = world.object
    if there is None:
        return None
    digest = "" if rules.left_out == "same rows" else digest_of(there.rows)
    return ObjectState(there.version, digest, many(rules, len(there.rows)), write=there.write, folded=there.folded)


def read_at(log: Log) -> int:
    return next((answer[0] for name, answer in reversed(log) if name == "read"), 0)


def put(rules: Rules, world: Model, who: Who, log: Log, request: Request) -> Iterator[Outcome]:
    _, rows, write, folded, expected = request
    there, at = world.object, read_at(log)
    if (there.version if there else None) != expected and rules.left_out != "compare and swap":
        yield "412", world, Conflict(KEY), ""
        return
    broken = ""
    if there and there.rows != rows:
        broken += "b" * (at < there.read_at) + "k" * (there.read_at <= at < there.confirmed_at)
        broken += "v" * bool(dict(there.rows).keys() - dict(rows).keys())
    elif there and there.folded == folded and not closes(who, log):
        broken += "n"
    version = digest_of(rows) if rules.left_out == "own versions" else write
    write = "" if rules.left_out == "own versions" else write
    after = world._replace(object=Object(version, rows, write, folded, at, at))
    yield "put", after, version, broken
    yield "put, answer lost", after, Conflict(KEY), broken


def closes(who: Who, log: Log) -> bool:
    record = next((answer for name, answer in log if name == "records"), None)
    return who.kind != "live" and not (record and record.is_closed)


def answer(rules: Rules, world: Model, name: str) -> Any:
    if name == "objects":
        there = [(0, (KEY, world.object.version))] if world.object else []
        return (*there, *([(1, (DELTA, "old delta"))] if world.delta is not None else []))
    if name == "sums":
        return tuple(sums_of(rows_of(rules.history[world.source])).items())
    return world.state.record if name == "records" else sum(map(bool, rules.history[world.source]))


def begun(rules: Rules, world: Model, kind: str) -> Log:
    """What a pass knows when it begins: the counts and its record; a reconcile, what is listed and the sums."""
    names = ("records", "objects", "sums") if kind == "reconcile" else ("counts", "records")
    return tuple((name, answer(rules, world, name)) for name in names)


def alone(rules: Rules, world: Model) -> tuple[Model, list[str]]:
    """One reconcile with nobody else about and nothing failing."""
    who, trace = Who(9, "reconcile", world.state.is_past, world.source), []
    log = begun(rules, world, who.kind)
    while request := next_effect(rules, who, log):
        _, world, answer, _ = next(outcomes(rules, world, who, log, request))
        trace.append(request[0])
        log = (*log, (request[0], answer))
    return world, trace


def all_rows(world: Model) -> tuple[Row, ...]:
    """What a reader sees, who skips a delta that the object holds."""
    held = world.object.rows if world.object else ()
    is_folded = world.delta is None or (world.object is not None and world.object.folded)
    return held if is_folded else (*held, *(world.delta or ()))


class Step(NamedTuple):
    """A world, the states that it may be set back to, what may still happen, and the passes under way."""

    world: Model
    past: frozenset[State]
    restores: int
    losses: int
    vanishes: int
    begins: int
    passes: tuple[tuple[Who, Log], ...] = ()


@dataclass
class Exploration:
    """Every state that can be reached, once, and what is broken in them."""

    rules: Rules
    seen: set[Step] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    looked_at: set[Model] = field(default_factory=set)

    def run(self, until: str = "never") -> "Exploration":
        """All states, or only until these properties are broken."""
        rules = self.rules
        todo = [Step(self.first(), frozenset(), rules.restores, rules.lost_answers, rules.vanishes, rules.passes)]
        while todo and not set(until) <= self.broken:
            for after in self.moves(todo.pop()):
                if after not in self.seen:
                    self.seen.add(after)
                    todo.append(after)
        return self

    def first(self) -> Model:
        rows, is_old = rows_of(self.rules.history[0]), self.rules.begun == "delta"
        if not self.rules.begun:
            return Model()
        held = rows[:1] if is_old else rows
        version, digest = digest_of(held) if self.rules.left_out == "own versions" else "old", digest_of(held)
        record = Noted(version, digest, len(held), len(rows), is_old, "" if is_old else digest)
        there = Object(version, held, "", 0, 0, 0)
        return Model(
            due=0 if is_old else None,
            object=there,
            delta=rows[1:] if is_old else None,
            state=State(record, is_old),
            was_closed=is_old,
        )

    def moves(self, step: Step) -> Iterator[Step]:
        world = step.world
        if world not in self.looked_at:
            self.looked_at.add(world)
            self.broken |= set(faults(self.rules, world))
        if world.source + 1 < len(self.rules.history):
            yield step._replace(world=world._replace(source=world.source + 1))
        if world.due is None:
            yield step._replace(world=world._replace(due=world.source))
        for old in {State(), *step.past} - {world.state} if step.restores else ():
            yield step._replace(world=world._replace(state=old), restores=step.restores - 1)
        if step.vanishes and world.object:
            yield step._replace(world=world._replace(object=None), vanishes=step.vanishes - 1)
        for new in self.begin(world, step.begins) if step.begins else ():
            yield step._replace(begins=step.begins - 1, passes=in_order(*step.passes, new))
        for index in range(len(step.passes)):
            yield from self.effects(step, index)

    def effects(self, step: Step, index: int) -> Iterator[Step]:
        """The next effect of one pass, however it may end."""
        world, (who, log) = step.world, step.passes[index]
        others = (*step.passes[:index], *step.passes[index + 1 :])
        request = next_effect(self.rules, who, log) or ()
        for label, after, answer, broken in outcomes(self.rules, world, who, log, request):
            is_lost = label == "put, answer lost"
            if is_lost and not step.losses:
                continue
            self.broken |= set(broken)
            past = step.past | {world.state} if step.restores and after.state != world.state else step.past
            known = (*log, (request[0], answer))
            goes_on = [(who, known)] if next_effect(self.rules, who, known) else []
            passes = in_order(*others, *goes_on)
            yield step._replace(world=after, past=past, losses=step.losses - is_lost, passes=passes)

    def begin(self, world: Model, number: int) -> Iterator[tuple[Who, Log]]:
        """Passes that may begin now; each asks for counts and its record at once."""
        source = world.source if self.rules.left_out == "version first" else 0
        for kind in ("live",) if world.due is None else ("close", "reconcile"):
            who, log = Who(number, kind, world.state.is_past, source), begun(self.rules, world, kind)
            if (kind == "reconcile" or not world.state.is_past) and next_effect(self.rules, who, log):
                yield who, log


def in_order(*passes: tuple[Who, Log]) -> tuple[tuple[Who, Log], ...]:
    """Which pass began first makes no difference."""
    return tuple(sorted(passes, key=hash))


def faults(rules: Rules, world: Model) -> str:
    """What is broken in a world, whatever its passes do next."""
    rows, history = all_rows(world), rules.history
    broken = "a" if len(dict(rows)) < len(rows) else ""
    if world.was_closed and world.due is not None and not rules.vanishes:
        answers = [rows_of(each) for each in history[world.due : world.source + 1]]
        had = set.intersection(*(set(dict(each)) for each in answers))
        fine = {row for each in answers for row in each}
        broken += "d" * (not had <= dict(rows).keys() or any(row not in fine for row in rows if row[0] in had))
    after, _ = alone(rules, world)
    is_equal = set(rows_of(history[world.source])) <= set(after.object.rows if after.object else ())
    broken += "c" * (not is_equal or after.delta is not None)
    _, trace = alone(rules, after)
    return broken + "q" * bool({"get", "put"} & set(trace))


pytestmark = pytest.mark.timeout(600)  # each takes some seconds of CPU, which a busy machine gives slowly


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Hundreds of thousands of tuples that stay: looking for garbage among them takes half of the time. Nobody reads
    the log of so many passes.
    """
    gc.disable()
    logging.disable()
    yield
    next_effect.cache_clear()
    logging.disable(logging.NOTSET)
    gc.enable()


def slow(rules: Rules, letters: str) -> Any:
    """One that takes several seconds."""
    return pytest.param(rules, letters, marks=pytest.mark.slow)


# What is tried, and what breaks by choice: a correction that is taken back while a holder is paused may stand until the
# next look.
RIGHT = (
    (Rules(LATE, begun="open"), ""),
    slow(Rules(GONE, begun="open"), ""),
    (Rules(BACK, begun="open"), "k"),
    slow(Rules(LATE, restores=1), ""),
    slow(Rules(BACK[:2], lost_answers=1), ""),
    slow(Rules(GONE[:2], begun="open", lost_answers=1), ""),
    (Rules(((1, 1), (2, 1)), begun="delta"), ""),
    slow(Rules(((1, 1),), begun="delta", restores=1), ""),
    (Rules(SWAP), ""),
    slow(Rules(((1,),), begun="open", vanishes=1), ""),
    *([slow(Rules(GONE[:2], begun="open", restores=1), "")] if EFFORT > 1 else []),  # by far the most states
)


@pytest.mark.slow
@pytest.mark.parametrize(("rules", "broken"), RIGHT, ids=lambda each: name_of(each) if isinstance(each, Rules) else "")
def test_no_interleaving_of_two_passes_breaks_anything(rules: Rules, broken: str) -> None:
    explored = Exploration(rules).run()
    assert explored.broken <= set(broken)
    assert len(explored.seen) > 500, "the model does not move"


WRONG = (
    (Rules(LATE, left_out="compare and swap"), "bnv"),
    (Rules(LATE, left_out="read again"), "b"),
    (Rules(LATE, left_out="version first"), "b"),
    (Rules(GONE, left_out="unite"), "v"),
    (Rules(LATE, left_out="source wins"), "cd"),
    (Rules(LATE, begun="open", left_out="identity"), "a"),
    (Rules(GONE, left_out="two digests"), "q"),
    slow(Rules(((1,), (2,), (1,)), begun="open", restores=1, left_out="listing"), "c"),
    (Rules(((1,),), begun="open", vanishes=1, left_out="listing"), "c"),
    (Rules(SWAP, begun="open", left_out="content"), "c"),
    (Rules(GONE, left_out="same rows"), "n"),
    (Rules(BACK, begun="open", left_out="closing writes"), "dk"),
    (Rules(BACK, begun="open", left_out="own versions"), "bdk"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("rules", "breaks"), WRONG, ids=lambda each: name_of(each) if isinstance(each, Rules) else "")
def test_a_rule_that_is_left_out_breaks_what_it_is_there_for(rules: Rules, breaks: str) -> None:
    assert Exploration(rules).run(until=breaks).broken >= set(breaks)


def name_of(rules: Rules) -> str:
    names: dict[object, str] = {LATE: "late", GONE: "gone", BACK: "taken back", SWAP: "exchanged"}
    tried = (
        names.get(rules.history, "short"),
        rules.begun,
        "restored" * rules.restores,
        "lost answer" * rules.lost_answers,
        "deleted" * rules.vanishes,
    )
    return rules.left_out or " ".join(filter(None, tried))
