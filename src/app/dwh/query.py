"""Which rows a GET asks for: its parameters, checked against the table, and the SQL that follows.

Invariant: names in the SQL come from the declaration, values are bound; what is unknown or twice is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args
from urllib.parse import urlencode
from uuid import UUID

from app.db.database import UNSTORABLE, Dialect, instant_text
from app.dwh.tables import INTEGER_BITS, Table, TableColumn
from app.web.errors import Refusal, Refused

Format = Literal["json", "csv", "ndjson", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
DIRECTIONS = ("desc", "asc")
DEFAULT_ROWS = 100
MAX_ROWS = 10_000
MAX_FILE_ROWS = 1_000_000
MAX_OFFSET = (1 << 63) - 1 - MAX_FILE_ROWS
OPTIONS = ("pk", "limit", "offset", "after_id", "sort_by", "sort_dir", "format")


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of one table: those that equal `filters`, in an order, from a place on. One more than `limit` is read."""

    table: Table
    format: Format
    limit: int
    offset: int
    sort_by: str
    descending: bool
    after_id: int | None = None
    filters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> Mapping[str, Any]:
        """The values that the SQL names."""
        return {**self._named, "row_limit": self.limit + 1, "row_offset": self.offset}

    @property
    def edge_params(self) -> Mapping[str, Any]:
        """The values that the SQL of the edge names."""
        return {**self._named, "row_limit": 2, "row_offset": self.offset + self.limit - 1}

    @property
    def _named(self) -> Mapping[str, Any]:
        after = {} if self.after_id is None else {"after_id": self.after_id}
        return {**after, **{f"equal_{name}": value for name, value in self.filters.items()}}

    def is_made(self, dialect: Dialect) -> bool:
        """Whether the database makes the JSON of each row. SQLite does so for less than its values cost one by one; but
        it writes 15 digits of a float, reads all of a JSON value again, and does it for every row before it sorts.
        """
        is_json = dialect == "sqlite" and self.format in ("json", "ndjson") and self.sort_by == "id"
        return is_json and not any(column.kind in ("float", "json") for column in self.table.columns)

    def sql(self, dialect: Dialect) -> str:
        """The query: columns in their order, or id and JSON where it is made. Rows without a value come last, and equal
        ones by id, in both databases.
        """
        if self.is_made(dialect):
            pairs = ", ".join(f"'{column.name}', {_in_json(column)}" for column in self.table.stored)
            return self._sql(f"id, json_object({pairs}) AS line", dialect)
        return self._sql(", ".join(_read(column, dialect) for column in self.table.stored), dialect)

    def edge_sql(self, dialect: Dialect) -> str:
        """The ids of the last row and of the one behind it, as far as there are such rows."""
        return self._sql("id", dialect)

    def _sql(self, read: str, dialect: Dialect) -> str:
        kinds = {column.name: column for column in self.table.stored}
        conditions = [f"{name} = {_bound(kinds[name], dialect)}" for name in self.filters]
        if self.after_id is not None:
            conditions.append(f"id {'<' if self.descending else '>'} :after_id")
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        return (
            f"SELECT {read} FROM {self.table.name}{where} ORDER BY {self._order(kinds[self.sort_by], dialect)} "  # noqa: S608
            f"LIMIT :row_limit OFFSET :row_offset"
        )

    def _order(self, column: TableColumn, dialect: Dialect) -> str:
        direction = "DESC" if self.descending else "ASC"
        if column.name == "id":
            return f"id {direction}"
        collation = ' COLLATE "C"' if column.kind == "text" and dialect == "postgres" else ""
        return f"{self.table.name}.{column.name}{collation} {direction} NULLS LAST, id {direction}"

    def next_page(self, path: str, last_id: int) -> str:
        """The URL of what follows; by id where the order allows it, since an offset costs the more the larger it is."""
        by_id = self.sort_by == "id"
        place = {"after_id": last_id} if by_id else {"offset": self.offset + self.limit}
        order = {"sort_by": self.sort_by, "sort_dir": "desc" if self.descending else "asc", "format": self.format}
        filters = {
            name: str(value).lower() if isinstance(value, bool) else value for name, value in self.filters.items()
        }
        return f"{path}?{urlencode({'limit': self.limit, **place, **order, **filters})}"


def _read(column: TableColumn, dialect: Dialect) -> str:
    """The column as a plain value, the same in both databases."""
    if dialect == "sqlite":
        return column.name
    if column.kind == "instant":
        return f"""to_char({column.name}, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS {column.name}"""
    return f"{column.name}::text AS {column.name}" if column.kind in ("uuid", "json") else column.name


def _in_json(column: TableColumn) -> str:
    """What stands for the column in SQLite's `json_object`."""
    flag = f"json(CASE {column.name} WHEN 1 THEN 'true' WHEN 0 THEN 'false' END)"
    return flag if column.kind == "bool" else column.name


def _bound(column: TableColumn, dialect: Dialect) -> str:
    casts = {"uuid": "uuid", "instant": "timestamptz", "float": "double precision"}
    cast = casts.get(column.kind, "") if dialect == "postgres" else ""
    return f":equal_{column.name}" + (f"::{cast}" if cast else "")


def selection(table: Table, given: Sequence[tuple[str, str]]) -> Selection:
    """What the query string asks for. Raises Refused: 400 for what is unknown, 422 for a value out of its range."""
    options = dict(given)
    if len(options) < len(given):
        name = next(name for number, (name, _) in enumerate(given) if name in dict(given[:number]))
        raise Refused(Refusal(422, f"{name[:80]} is given twice", "give each parameter once", name[:80]))
    columns = {column.name: column for column in table.stored}
    filters = {name: _value(columns.get(name), name, text) for name, text in options.items() if name not in OPTIONS}
    if "pk" in options:
        filters["id"] = _value(columns["id"], "pk", options["pk"])
    format_ = _one_of(options, "format", FORMATS)
    limit = _whole(options, "limit", (1, MAX_ROWS if format_ == "json" else MAX_FILE_ROWS))
    after_id = _whole(options, "after_id", (0, (1 << 63) - 1))
    offset = _whole(options, "offset", (0, MAX_OFFSET))
    sortable = tuple(column.name for column in table.stored if column.kind != "json")
    sort_by = _one_of(options, "sort_by", sortable)
    if after_id is not None and (sort_by != "id" or offset):
        raise Refused(
            Refusal(422, "after_id goes with the order by id, and without offset", "leave one out", "after_id")
        )
    descending = _one_of(options, "sort_dir", DIRECTIONS) == "desc"
    limit = DEFAULT_ROWS if limit is None else limit
    return Selection(table, format_, limit, offset or 0, sort_by, descending, after_id, filters)  # type: ignore[arg-type]


def _one_of(options: Mapping[str, str], name: str, allowed: Sequence[str]) -> str:
    """The first one is the default."""
    value = options.get(name, allowed[0])
    if value not in allowed:
        raise Refused(Refusal(400, f"{name} is not one of {', '.join(allowed)}", "use one of these", name))
    return value


def _whole(options: Mapping[str, str], name: str, bounds: tuple[int, int]) -> int | None:
    if name not in options:
        return None
    value = _digits(options[name])
    if value is None or not bounds[0] <= value <= bounds[1]:
        raise Refused(Refusal(422, f"{name} is not a whole number from {bounds[0]} to {bounds[1]}", "correct it", name))
    return value


def _digits(text: str) -> int | None:
    bare = text.removeprefix("-")
    return int(text) if bare.isascii() and bare.isdigit() and len(bare) <= len(str(1 << 63)) else None


def _value(column: TableColumn | None, name: str, text: str) -> Any:
    """The value of an equality filter."""
    if column is None or column.kind == "json":
        what = "cannot be filtered by" if column else "is no column of this table"
        raise Refused(Refusal(400, f"{name[:80]} {what}", "see /docs for the columns of this table", name[:80]))
    try:
        return _typed(column, text)
    except (ValueError, OverflowError):
        raise Refused(Refusal(400, f"{name} must be {column.wanted}", "correct the filter", name)) from None


def _typed(column: TableColumn, text: str) -> Any:
    if column.kind in INTEGER_BITS:
        value, bits = _digits(text), INTEGER_BITS[column.kind]
        if value is None or not -(1 << bits) <= value < 1 << bits:
            raise ValueError(text)
        return value
    if column.kind == "uuid":
        return str(UUID(text))
    if column.kind == "bool":
        return {"true": True, "false": False}.get(text.lower()) if text.lower() in ("true", "false") else _refuse(text)
    if column.kind == "instant":
        at = datetime.fromisoformat(text)
        return instant_text(at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC))
    if column.kind == "float":
        return _finite(text)
    return text if not UNSTORABLE.search(text) else _refuse(text)


def _finite(text: str) -> float:
    value = float(text)
    return value if value - value == 0 else _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)
