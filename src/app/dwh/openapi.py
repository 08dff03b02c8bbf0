"""The OpenAPI of /dwh, generated from the table declarations.

Invariant: it accepts exactly what the decoder accepts; schemathesis tests this.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType
from pydantic import BaseModel, Field

from app.dwh.query import ERASURE_OPTIONS, OPTIONS, Schema
from app.dwh.responses import MEDIA
from app.dwh.rows import WITHOUT_NUL, reader, row_type, value_type
from app.dwh.tables import Table, TableColumn
from app.web.errors import Answers, faults

WHOLE: Schema = {"type": "integer", "minimum": 0}
BUSY = {429: "too many requests at once", 503: "the warehouse cannot be reached: send the same request again"}
READ_FAULTS = faults({400: "an unknown column or parameter", 422: "a parameter is wrong: it is named", **BUSY})
WRITE_FAULTS = faults(
    {
        400: "not readable, without rows, or an unknown column or parameter",
        408: "the body did not arrive in time",
        409: "the Idempotency-Key was used for another request",
        413: "the body or a row is too large",
        415: "an unsupported media type or encoding",
        422: "a row or a parameter is wrong: it is named",
        **BUSY,
    }
)


def row(table: Table) -> Schema:
    """A row as posted: what the decoder accepts."""
    return _schema(reader(table.name).row_type)


def stored_row(table: Table) -> Schema:
    """A row as returned. No column is required, since `select` chooses the columns."""
    always = {"id", table.key.name, "created_at"}
    plain = {column.name: value_type(TableColumn(column.name, column.kind)) for column in table.stored}
    kinds = {name: kind if name in always or kind is Raw else kind | None for name, kind in plain.items()}
    return _schema(
        row_type([(name, kind | UnsetType if kind is not Raw else kind, UNSET) for name, kind in kinds.items()])
    )


def _schema(type_: Any) -> Schema:
    schema: Schema = msgspec.json.schema(type_)["$defs"]["Row"]
    return schema


def writing(table: Table) -> Mapping[str, Any]:
    """The operation POST."""
    rows = {"type": "array", "minItems": 1, "items": row(table)}
    envelope = {"type": "object", "required": ["data"], "properties": {"data": rows}, "additionalProperties": False}
    lines = {"schema": {"type": "string", "description": "one JSON object a line"}}
    csv = {"schema": {"type": "string", "description": "a header line, then rows; an empty cell is null"}}
    return {
        "requestBody": {
            "required": True,
            "description": "May be packed with gzip (`Content-Encoding: gzip`).",
            "content": {"application/json": {"schema": envelope}, "application/x-ndjson": lines, "text/csv": csv},
        },
        "parameters": [
            _parameter("on_error", {"type": "string", "enum": ["stop", "skip"], "default": "stop"}),
            _parameter("dry_run", {"type": "boolean", "default": False}),
            _parameter(
                "Idempotency-Key",
                {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
                "header",
            ),
            _parameter("Prefer", {"type": "string", "example": "resolution=merge-duplicates"}, "header"),
        ],
    }


def erasing(table: Table) -> Mapping[str, Any]:
    """The operation DELETE."""
    return {"parameters": [_parameter(*each) for each in {**ERASURE_OPTIONS, **_filters(table)}.items()]}


def _filters(table: Table) -> Schema:
    """A value to equal, or `operator.value`; several are allowed."""
    return {column.name: {"type": "string", "pattern": WITHOUT_NUL} for column in table.stored}


def reading(table: Table) -> Mapping[str, Any]:
    """The operation GET."""
    sortable = [column.name for column in table.stored if column.kind != "json"]
    options = {**OPTIONS, "sort_by": {**OPTIONS["sort_by"], "enum": sortable}, **_filters(table)}
    parameters = [_parameter(*each) for each in options.items()]
    return {"parameters": [*parameters, _parameter("Prefer", {"type": "string", "example": "count=exact"}, "header")]}


def _parameter(name: str, schema: Schema, place: str = "query") -> Schema:
    return {"name": name, "in": place, "required": False, "schema": schema}


class SkippedRow(BaseModel):
    """A row that was left out."""

    index: int = Field(ge=0)
    field: str
    message: str


class RowsStored(BaseModel):
    """What POST answers. The last three: a dry run, and `on_error=skip`."""

    inserted_ids: list[int]
    count: int = Field(ge=0)
    batches: int = Field(ge=0)
    skipped: int = Field(ge=0)
    dry_run: bool = False
    error_count: int = Field(default=0, ge=0)
    errors: list[SkippedRow] = []


WRITE_ANSWERS: Answers = {
    200: {"description": "stored", "content": {"application/json": {}}, "model": RowsStored},
    **WRITE_FAULTS,
}


class RowsErased(BaseModel):
    """What DELETE answers: rows deleted, natural keys remembered for it, and keys that may come back."""

    deleted: int = Field(ge=0)
    remembered: int = Field(ge=0)
    forgotten: int = Field(ge=0)
    dry_run: bool = False


ERASE_ANSWERS: Answers = {200: {"description": "deleted", "model": RowsErased}, **READ_FAULTS}


def read_answers(table: Table) -> Answers:
    """What GET answers."""
    rows = {"type": "array", "items": stored_row(table)}
    page = {"type": "object", "required": ["rows", "count"], "properties": {"rows": rows, "count": WHOLE}}
    content: dict[str, Any] = {media: {} for media in MEDIA.values()}
    content[MEDIA["json"]] = {"schema": page}
    return {200: {"description": "the rows", "content": content}, **READ_FAULTS}
