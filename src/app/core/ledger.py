"""The ledger of a run: every row counted at the source is accounted for, or the run is not `ok`.

    counted = new + already there + corrected + set aside + waiting

The unit is the pipeline's own: field values (by field), items, records, lines. Invariant: the two sides are tallied in
different places, the left one where the source is queried and the right one where rows are written, so a row lost in
between leaves a gap.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

NAMED_PARTITIONS = 20
NAMED_FIELDS = 100
SAMPLE_CHARACTERS = 200
ALL = ""  # the single field of a pipeline whose unit has no fields


@dataclass(frozen=True, slots=True)
class Tally:
    """Numbers for one field or partition, in the ledger's unit. `counted` was queried before `read` was read."""

    counted: int = 0
    read: int = 0
    new: int = 0
    already_there: int = 0
    corrected: int = 0
    set_aside: int = 0
    waiting: int = 0

    @property
    def gap(self) -> int:
        """The amount not accounted for; 0 when the tally balances."""
        return self.counted - self.new - self.already_there - self.corrected - self.set_aside - self.waiting

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.counted + other.counted,
            self.read + other.read,
            self.new + other.new,
            self.already_there + other.already_there,
            self.corrected + other.corrected,
            self.set_aside + other.set_aside,
            self.waiting + other.waiting,
        )


TALLY_NAMES = tuple(asdict(Tally()))


@dataclass(frozen=True, slots=True)
class SetAside:
    """What was set aside for one reason: the total, how much of it is new in this run, and one sample.

    `reason` is one of a few fixed texts ("no device tag"), since it becomes a metric label.
    """

    reason: str
    number: int
    new: int = 0
    sample: str = ""

    def __add__(self, other: "SetAside") -> "SetAside":
        return SetAside(self.reason, self.number + other.number, self.new + other.new, self.sample or other.sample)


@dataclass(frozen=True, slots=True)
class KeptFile:
    """Where something set aside is kept: an object of the store by its `key`, or a file on this machine."""

    name: str
    size_bytes: int
    key: str = ""
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Ledger:
    """The ledger of a run or of a part of one; ledgers can be added.

    `fields`: by field, or under ALL. `partitions`: the notable ones, at most NAMED_PARTITIONS.
    """

    unit: str = "rows"
    fields: Mapping[str, Tally] = field(default_factory=dict)
    set_aside: Sequence[SetAside] = ()
    partitions: Mapping[str, Tally] = field(default_factory=dict)

    @property
    def total(self) -> Tally:
        """All fields together."""
        return sum(self.fields.values(), Tally())

    @property
    def gap(self) -> int:
        """The amount not accounted for, or written without being counted; fields do not cancel each other out."""
        return sum(abs(tally.gap) for tally in self.fields.values())

    @property
    def closes(self) -> bool:
        """True when every field balances."""
        return self.gap == 0

    @property
    def newly_set_aside(self) -> Sequence[SetAside]:
        """The reasons for which this run set aside something new."""
        return [one for one in self.set_aside if one.new]

    def settled(self) -> "Ledger":
        """The same without the waiting part, which the next run counts again."""
        fields, partitions = (
            {name: replace(one, counted=one.counted - one.waiting, waiting=0) for name, one in tallies.items()}
            for tallies in (self.fields, self.partitions)
        )
        return replace(self, fields=fields, partitions=partitions)

    def of_partition(self, partition: str) -> "Ledger":
        """The same, with its total listed under `partition` if a person would want to see it."""
        total = self.total
        if total.gap == 0 and not (total.corrected or total.set_aside or total.waiting):
            return self
        return Ledger(self.unit, self.fields, self.set_aside, {partition or "(unnamed)": total})

    def __add__(self, other: "Ledger") -> "Ledger":
        # A part without a ledger has no unit either.
        if not other:
            return self
        if not self:
            return other
        return Ledger(
            other.unit,
            _bounded_fields(_sums(self.fields, other.fields)),
            _reasons((*self.set_aside, *other.set_aside)),
            _worst(_sums(self.partitions, other.partitions)),
        )

    def __bool__(self) -> bool:
        return bool(self.fields or self.set_aside or self.partitions)


def ledger_of(tally: Tally, *set_aside: SetAside, unit: str) -> Ledger:
    """A ledger without fields. `tally.set_aside` is what `set_aside` adds up to."""
    number = sum(one.number for one in set_aside)
    return Ledger(unit, {ALL: tally + Tally(set_aside=number)}, _reasons(set_aside))


def sampled(text: str) -> str:
    r"""A sample in stored form: one line of bounded length; unprintable characters are shown as `\x1b`, `\ud800`."""
    words = " ".join(text[: 4 * SAMPLE_CHARACTERS].split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
    return line if len(line) <= SAMPLE_CHARACTERS else f"{line[:SAMPLE_CHARACTERS]}..."


def fault_of(ledger: Ledger) -> tuple[str, str] | None:
    """Why a run with this ledger is not `ok`, and the next step; None when every row is accounted for."""
    gaps = {name: tally.gap for name, tally in ledger.fields.items() if tally.gap}
    if gaps:
        name, gap = max(gaps.items(), key=lambda item: abs(item[1]))
        of = f" of {name}" if name != ALL else ""
        total = ledger.fields[name]
        wrong = "not accounted for" if gap > 0 else "present although never counted"
        sums = (
            f"{total.counted} counted, {total.new} new, {total.already_there} already there, "
            f"{total.corrected} corrected, {total.set_aside} set aside, {total.waiting} waiting"
        )
        hint = "run the job again; if the gap stays, please report it with the log at LOG_LEVEL=DEBUG"
        return f"{abs(gap)} {ledger.unit}{of} are {wrong}: {sums}", hint
    for one in ledger.newly_set_aside:
        others = f", and {len(ledger.newly_set_aside) - 1} other reasons" if len(ledger.newly_set_aside) > 1 else ""
        sample = f", for example {sampled(one.sample)}" if one.sample else ""
        return f"{one.new} {ledger.unit} set aside: {one.reason}{sample}{others}", "look at what was set aside"
    return None


def summary_of(ledger: Ledger) -> str:
    """One line for people: `18 values counted: 12 new, 6 already there`; "" for a run without a ledger."""
    if not ledger:
        return ""
    total = ledger.total
    reasons = "; ".join(
        f"{one.number} {one.reason}"
        + (f", {one.new} of them new" if one.new else "")
        + (f", for example {sampled(one.sample)}" if one.sample else "")
        for one in ledger.set_aside
    )
    said = (
        (total.new, "new"),
        (total.already_there, "already there"),
        (total.corrected, "corrected"),
        (total.set_aside, "set aside" + (f" ({reasons})" if reasons else "")),
        (total.waiting, "waiting"),
        (ledger.gap, "NOT ACCOUNTED FOR"),
    )
    parts = ", ".join(f"{number} {what}" for number, what in said if number)
    return f"{total.counted} {ledger.unit} counted{f': {parts}' if parts else ''}"


def to_json(ledger: Ledger) -> Mapping[str, Any]:
    """The recorded and displayed form: totals first, then what explains them."""
    total = ledger.total
    return {
        "unit": ledger.unit,
        "closes": ledger.closes,
        **asdict(total),
        "reasons": [
            {"reason": one.reason, "number": one.number, "new": one.new, "sample": sampled(one.sample)}
            for one in ledger.set_aside
        ],
        "fields": {_encodable(name): asdict(tally) for name, tally in ledger.fields.items() if name != ALL},
        "partitions": {_encodable(name): asdict(tally) for name, tally in ledger.partitions.items()},
    }


def from_json(document: Mapping[str, Any]) -> Ledger:
    """The ledger that `to_json` wrote; an empty document is the ledger of a run without one."""
    if not document:
        return Ledger()
    named = {name: Tally(**tally) for name, tally in document["fields"].items()}
    of_named = sum(named.values(), Tally())
    rest = Tally(**{name: document[name] - getattr(of_named, name) for name in TALLY_NAMES})
    return Ledger(
        document["unit"],
        {ALL: rest, **named} if rest != Tally() or not named else named,
        tuple(SetAside(**one) for one in document["reasons"]),
        {name: Tally(**tally) for name, tally in document["partitions"].items()},
    )


def _encodable(text: str) -> str:
    """Lone surrogates, which no encoding accepts, replaced by their Python escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _sums(one: Mapping[str, Tally], other: Mapping[str, Tally]) -> Mapping[str, Tally]:
    added = dict(one)
    for name, tally in other.items():
        added[name] = added[name] + tally if name in added else tally
    return added


def _bounded_fields(tallies: Mapping[str, Tally]) -> Mapping[str, Tally]:
    """Fields beyond NAMED_FIELDS become one entry, so that a measurement with a thousand fields has a short record."""
    if len(tallies) <= NAMED_FIELDS:
        return tallies
    # Those with a gap first: people look for them.
    names = sorted(tallies, key=lambda name: (-abs(tallies[name].gap), name))
    kept = {name: tallies[name] for name in names[: NAMED_FIELDS - 1] if name != "..."}
    rest = sum((tally for name, tally in tallies.items() if name not in kept), Tally())
    return {**kept, "...": rest}


def _reasons(some: Iterable[SetAside]) -> Sequence[SetAside]:
    added: dict[str, SetAside] = {}
    for one in some:
        added[one.reason] = added[one.reason] + one if one.reason in added else one
    return tuple(added[reason] for reason in sorted(added))


def _worst(partitions: Mapping[str, Tally]) -> Mapping[str, Tally]:
    if len(partitions) <= NAMED_PARTITIONS:
        return partitions

    def rank(item: tuple[str, Tally]) -> tuple[int, int, str]:
        return -abs(item[1].gap), -(item[1].set_aside + item[1].waiting + item[1].corrected), item[0]

    return dict(sorted(partitions.items(), key=rank)[:NAMED_PARTITIONS])
