"""What a POST is answered with, and what is wrong with a body or a row."""

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from app.core.errors import Rejected

# What is wrong with a body or with one of its rows, as the caller is told.
#
# Invariant: a message never repeats a value of the body, which may be personal; it says where and what is wanted.

SHAPE_HINT = "see /docs for the columns of this table"
ROW_HINT = "correct that row, or send ?on_error=skip to store the others"


class BadRequest(Rejected):
    """A request that cannot be served: `status` is the HTTP status, `fault` the field or parameter, "" for none."""

    def __init__(self, status: int, message: str, hint: str, fault: str = "") -> None:
        super().__init__(message, hint)
        self.status = status
        self.fault = fault


@dataclass(frozen=True, slots=True)
class RowFault:
    """A row that cannot be stored. `index` counts from 0; `field` is "" when it is the row as such."""

    index: int
    field: str
    message: str

    def refusal(self) -> BadRequest:
        """The answer when one bad row refuses the whole request."""
        where = f"row {self.index}, field {self.field}" if self.field else f"row {self.index}"
        fault = f"data.{self.index}.{self.field}" if self.field else f"data.{self.index}"
        return BadRequest(422, f"{where}: {self.message}", ROW_HINT, fault)


# What a POST is answered with, as a value and as JSON.
#
# Invariant: the answer that is kept under an Idempotency-Key holds all that is needed to give it again.

PIECE_IDS = 10_000


@dataclass(frozen=True, slots=True)
class Inserted:
    """`ids` of rows that were really inserted. In a dry run the ids are left out, their number is `count`."""

    ids: "array[int]"
    rows: int
    batches: int
    count: int = -1
    dry_run: bool = False
    replayed: bool = False

    @property
    def inserted_rows(self) -> int:
        """How many rows were inserted, or would be."""
        return self.count if self.count >= 0 else len(self.ids)


def text_of(done: Inserted) -> str:
    """What is kept."""
    return json.dumps({"ids": done.ids.tolist(), "rows": done.rows, "batches": done.batches})


def answer_of(text: str) -> Inserted:
    """What was kept."""
    held = json.loads(text)
    return Inserted(array("q", held["ids"]), held["rows"], held["batches"])


def body(done: Inserted, faults: Sequence[RowFault] | None, fault_count: int) -> Iterator[bytes]:
    """The JSON, in pieces, since there may be millions of ids. `faults` None: not asked to skip them."""
    import msgspec

    yield b'{"inserted_ids":['
    for start in range(0, len(done.ids), PIECE_IDS):
        ids = msgspec.json.encode(done.ids[start : start + PIECE_IDS].tolist())
        yield (b"," if start else b"") + ids[1:-1]
    inserted = done.inserted_rows
    yield f'],"count":{inserted},"batches":{done.batches},"skipped":{done.rows - inserted}'.encode()
    if done.dry_run:
        yield b',"dry_run":true'
    if faults is not None:
        listed = [{"index": each.index, "field": each.field, "message": each.message} for each in faults]
        yield f',"errors":{json.dumps(listed)},"error_count":{fault_count}'.encode()
    yield b"}"
