"""The OpenAPI of /dwh, from the declaration of the tables.

Invariant: it promises neither more nor less than the decoder does, which schemathesis tries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from app.dwh.query import DEFAULT_ROWS, DIRECTIONS, FORMATS, MAX_FILE_ROWS, MAX_OFFSET
from app.dwh.responses import MEDIA
from app.dwh.tables import INTEGER_BITS, KEY_CHARACTERS, Table, TableColumn

Schema = dict[str, Any]
WITHOUT_NUL = "^[^\\x00]*$"
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "hint"],
            "properties": {name: {"type": "string"} for name in ("message", "hint", "field")},
        }
    },
}
FAULTS = {
    400: "not readable, without rows, or an unknown column or parameter",
    401: "no key, or one that is not known",
    403: "the key lacks the scope",
    408: "the body did not arrive in time",
    409: "the Idempotency-Key was used for another request",
    413: "the body or a row is too large",
    415: "a media type or encoding that is not read",
    422: "a row or a parameter is wrong: it is named",
    429: "too many requests at once",
    503: "the warehouse cannot be reached: send the same request again",
}
READ_FAULTS = (400, 401, 403, 422, 429, 503)


def value(column: TableColumn) -> Schema:
    """The JSON Schema of a value that is given."""
    if column.kind in INTEGER_BITS:
        limit = 1 << INTEGER_BITS[column.kind]
        return {"type": "integer", "minimum": -limit, "maximum": limit - 1}
    if column.kind == "text":
        text: Schema = {"type": "string", "pattern": WITHOUT_NUL}
        if column.required:
            text |= {"minLength": 1, "maxLength": KEY_CHARACTERS}
        return {"anyOf": [text, {"type": "integer"}]} if column.takes_integers else text
    schemas: dict[str, Schema] = {
        "uuid": {"type": "string", "format": "uuid"},
        "instant": {"type": "string", "format": "date-time"},
        "float": {"type": "number"},
        "bool": {"type": "boolean"},
        "json": {},
    }
    return {**schemas[column.kind]}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]} if schema else {}


def row(table: Table) -> Schema:
    """A row as it is posted."""
    properties = {
        column.name: {**(value(column) if column.required else _nullable(value(column))), "description": column.wanted}
        for column in table.columns
    }
    return {
        "type": "object",
        "required": [table.key.name],
        "properties": properties,
        "additionalProperties": False,
    }


def stored_row(table: Table) -> Schema:
    """A row as it is read."""
    plain = {column.name: {"type": "string"} if column.kind == "text" else value(column) for column in table.stored}
    always = {"id", table.key.name, "created_at"}
    properties = {name: schema if name in always else _nullable(schema) for name, schema in plain.items()}
    return {"type": "object", "required": list(properties), "properties": properties, "additionalProperties": False}


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
        ],
    }


def reading(table: Table) -> Mapping[str, Any]:
    """The operation GET."""
    whole = {"type": "integer", "minimum": 0}
    sortable = [column.name for column in table.stored if column.kind != "json"]
    options = {
        "pk": value(table.stored[0]),
        "limit": {**whole, "minimum": 1, "maximum": MAX_FILE_ROWS, "default": DEFAULT_ROWS},
        "offset": {**whole, "maximum": MAX_OFFSET},
        "after_id": {**whole, "maximum": (1 << 63) - 1},
        "sort_by": {"type": "string", "enum": sortable, "default": "id"},
        "sort_dir": {"type": "string", "enum": list(DIRECTIONS)},
        "format": {"type": "string", "enum": list(FORMATS)},
    }
    filters = {column.name: _filter(column) for column in table.stored if column.kind != "json"}
    return {"parameters": [_parameter(name, schema) for name, schema in {**options, **filters}.items()]}


def _filter(column: TableColumn) -> Schema:
    return {"type": "string", "pattern": WITHOUT_NUL} if column.kind == "text" else value(column)


def _parameter(name: str, schema: Schema, place: str = "query") -> Schema:
    return {"name": name, "in": place, "required": False, "schema": schema}


def write_answers() -> dict[int | str, dict[str, Any]]:
    """What POST answers."""
    whole = {"type": "integer", "minimum": 0}
    fault = {
        "type": "object",
        "properties": {"index": whole, "field": {"type": "string"}, "message": {"type": "string"}},
    }
    properties = {
        "inserted_ids": {"type": "array", "items": {"type": "integer"}},
        **dict.fromkeys(("count", "batches", "skipped", "error_count"), whole),
        "dry_run": {"type": "boolean"},
        "errors": {"type": "array", "items": fault},
    }
    answer = {"type": "object", "required": ["inserted_ids", "count", "batches", "skipped"], "properties": properties}
    return {200: _answer("stored", {"application/json": {"schema": answer}}), **_faults(tuple(FAULTS))}


def read_answers(table: Table) -> dict[int | str, dict[str, Any]]:
    """What GET answers."""
    rows = {"type": "array", "items": stored_row(table)}
    page = {
        "type": "object",
        "required": ["rows", "count"],
        "properties": {"rows": rows, "count": {"type": "integer", "minimum": 0}},
    }
    content: dict[str, Any] = {media: {} for media in MEDIA.values()}
    content[MEDIA["json"]] = {"schema": page}
    return {200: _answer("the rows", content), **_faults(READ_FAULTS)}


def _faults(codes: Sequence[int]) -> dict[int | str, dict[str, Any]]:
    return {code: _answer(FAULTS[code], {"application/json": {"schema": ERROR}}) for code in codes}


def _answer(description: str, content: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": content}
