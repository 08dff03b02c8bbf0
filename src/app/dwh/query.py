"""Which rows a request selects: its parameters, checked against the table, and the resulting SQL.

Invariant: names in the SQL come from the declaration, values are bound; unknown names are refused. The operators are
those of PostgREST, https://docs.postgrest.org/en/stable/references/api/tables_views.html.
"""

import base64
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args
from urllib.parse import urlencode
from uuid import UUID

from app.db.database import UNSTORABLE, Dialect, instant_text, lower_cases, lower_text
from app.dwh.tables import INTEGER_BITS, Table, TableColumn
from app.web.errors import Refused
from app.web.text_values import instant

Format = Literal["json", "csv", "ndjson", "parquet"]
Params = dict[str, Any]
Schema = dict[str, Any]
FORMATS: tuple[Format, ...] = get_args(Format)
DIRECTIONS = ("desc", "asc")
DEFAULT_ROWS = 100
MAX_ROWS = 10_000
MAX_FILE_ROWS = 1_000_000
MAX_OFFSET = (1 << 63) - 1 - MAX_FILE_ROWS
MAX_ID = (1 << 63) - 1
MAX_PLACE_CHARACTERS = 1000  # of a text value in a link: clients and proxies refuse long URLs
FLAG: Schema = {"type": "boolean", "default": False}
PK: Schema = {"type": "integer", "minimum": -MAX_ID - 1, "maximum": MAX_ID}
OPTIONS: Mapping[str, Schema] = {
    "pk": PK,
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_FILE_ROWS, "default": DEFAULT_ROWS},
    "offset": {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET},
    "after_id": {"type": "integer", "minimum": 0, "maximum": MAX_ID},
    "after": {"type": "string"},
    "select": {"type": "string"},
    "bom": FLAG,
    "formula_safe": FLAG,
    "sort_by": {"type": "string", "default": "id"},
    "sort_dir": {"type": "string", "enum": list(DIRECTIONS)},
    "format": {"type": "string", "enum": list(FORMATS)},
}
"""The options of a GET, as in its OpenAPI."""
ERASURE_OPTIONS: Mapping[str, Schema] = {"pk": PK, "forget": FLAG, "dry_run": FLAG}
YES_NO = {"true": True, "false": False, "1": True, "0": False}
CASTS = {"uuid": "::uuid", "instant": "::timestamptz", "float": "::double precision"}

# Filters: `column=value` for equality, `column=operator.value` for the operators below; `not.` negates any of them.
#
# Invariant: both databases find the same rows. Text is compared bytewise; `like` is case-sensitive in both.

COMPARISONS = {"eq": "=", "neq": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
OPERATORS = (*COMPARISONS, "in", "is", "like", "ilike")
FILTER = re.compile(rf"(?P<negated>not\.)?(?P<operator>{'|'.join(OPERATORS)})\.(?P<text>.*)", re.DOTALL)
IS = {"null": "NULL", "not_null": "NOT NULL", "true": "TRUE", "false": "FALSE", "unknown": "NULL"}
LIST_ITEM = re.compile(r'"([^"\\]*+(?:\\.[^"\\]*+)*+)"|([^,"()]*)', re.DOTALL)
MAX_LIST, MAX_PATTERN_CHARACTERS = 1000, 1000
PATTERN = re.compile(r"\\(.)|([%*])|(_)|(.)", re.DOTALL)
FAR = re.compile(r"-?infinity|[0-9]{4,6}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?\+00( BC)?", re.ASCII)
"""Timestamps of other programs that lie outside the years 1 to 9999, as PostgreSQL writes them."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ColumnFilter:
    """One condition on a column. `values`: the operands; one keyword for `is`, one pattern for `like`."""

    column: TableColumn
    operator: str
    values: Sequence[Any]
    negated: bool = False

    def sql(self, dialect: Dialect, name: str) -> tuple[str, Params]:
        """The SQL condition and its parameters, whose names begin with `name`."""
        column = self.column.name
        cast = CASTS.get(self.column.kind, "") if dialect == "postgres" else ""
        params = {f"{name}_{number}": value for number, value in enumerate(self.values)}
        places = ", ".join(f":{each}{cast}" for each in params)
        if self.operator == "is":
            condition, params = f"{column} IS {IS[self.values[0]]}", {}
        elif self.operator in ("like", "ilike"):
            condition, params = self._matching(dialect, name)
        elif self.operator == "in":
            condition = f"{column} IN ({places})" if params else "1 = 0"
        else:
            compared = column if self.operator in ("eq", "neq") else _ordered(self.column, dialect)
            condition = f"{compared} {COMPARISONS[self.operator]} {places}"
        return (f"NOT ({condition})" if self.negated else condition), params

    def _matching(self, dialect: Dialect, name: str) -> tuple[str, Params]:
        """The condition for `like` and `ilike`. SQLite uses GLOB: its LIKE always ignores case, for ASCII only.
        PostgreSQL's ILIKE goes by the locale of the database, which may be for ASCII only as well.
        """
        column, pattern, folds = self.column.name, self.values[0], self.operator == "ilike"
        if dialect == "postgres" and folds:
            return f'{column} COLLATE "C" ~ :{name}', {name: _caseless_regex(pattern)}
        if dialect == "postgres":
            return f"{column} LIKE :{name}", {name: _pattern(pattern, "%", "_", r"\%_", "\\")}
        left = f"lower_text({column})" if folds else column
        return f"{left} GLOB :{name}", {name: _pattern(lower_text(pattern) if folds else pattern, "*", "?", "[*?")}


def _pattern(text: str, any_text: str, any_character: str, special: str, escape: str = "") -> str:
    """Translate a PostgREST pattern, where `*` and `%` match any text, `_` any character, and a backslash quotes the
    next one, to the database's syntax. `escape` precedes a special character; without it, the character is put in
    brackets.
    """
    parts = []
    for escaped, many, one, plain in PATTERN.findall(text):
        literal = escaped or plain
        if literal in special and literal:
            literal = f"{escape}{literal}" if escape else f"[{literal}]"
        parts.append(any_text if many else any_character if one else literal)
    return "".join(parts)


def _caseless_regex(text: str) -> str:
    """A PostgREST pattern as a regular expression that lists all cases of each letter, as `lower_text` has them."""
    parts = []
    for escaped, many, one, plain in PATTERN.findall(text):
        literal = lower_text(escaped or plain)
        cases = f"[{literal}{_upper_cases()[literal]}]" if literal in _upper_cases() else re.escape(literal)
        parts.append(".*" if many else "." if one else cases)
    return f"^{''.join(parts)}$"


@cache
def _upper_cases() -> Mapping[str, str]:
    """Lower-case letter -> all others that become it."""
    found: dict[str, str] = {}
    for letter, lower in lower_cases().items():
        found[lower] = found.get(lower, "") + chr(letter)
    return found


def filter_of(column: TableColumn, given: str) -> ColumnFilter:
    """Parse the filter `column=given`. Raises Refused."""
    found = FILTER.fullmatch(given)
    negated, operator = (bool(found["negated"]), found["operator"]) if found else (False, "")
    text = found["text"] if found else given
    if column.kind == "json" and operator != "is":
        raise _wrong(column.name, "can be filtered by is.null and not.is.null only")
    if operator == "is":
        word = text.lower()
        if word not in IS or (word not in ("null", "not_null") and column.kind != "bool"):
            raise _wrong(column.name, f"takes is.null and is.not_null{', is.true, is.false' * (column.kind == 'bool')}")
        return ColumnFilter(column, operator, [word], negated)
    if operator in ("like", "ilike"):
        if column.kind != "text" or len(text) > MAX_PATTERN_CHARACTERS or UNSTORABLE.search(text):
            limits = f"columns of text and patterns of at most {MAX_PATTERN_CHARACTERS} characters, without NUL"
            raise _wrong(column.name, f"cannot be filtered like this: {operator} is for {limits}")
        return ColumnFilter(column, operator, [text], negated)
    texts = _items(column, text) if operator == "in" else [text]
    try:
        return ColumnFilter(column, operator or "eq", [_typed(column, each) for each in texts], negated)
    except (ValueError, OverflowError):
        raise _wrong(column.name, f"must be {column.wanted}") from None


def _wrong(name: str, what: str) -> Refused:
    hint = f"correct the filter; operators are {', '.join(OPERATORS)}, and not. before them"
    return Refused(400, f"{name} {what}", hint, name)


def _items(column: TableColumn, text: str) -> Sequence[str]:
    """Parse the items of `(a,b,"c,d")`; inside quotes, a backslash escapes a quote or a backslash."""
    if not (text.startswith("(") and text.endswith(")")) or len(text) < len("()"):
        what = f"takes in.(…), a list in parentheses; the text itself is eq.in.{text[:20]}"
        raise _wrong(column.name, what)
    items: list[str] = []
    at, end = 1, len(text) - 1
    while end > 1:
        item = LIST_ITEM.match(text, at, end)
        if item is None or len(items) == MAX_LIST or (item.end() < end and text[item.end()] != ","):
            raise _wrong(column.name, f"takes at most {MAX_LIST} items; quote those with a comma, quote or parenthesis")
        quoted, plain = item.groups()
        items.append(plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL))
        if item.end() == end:
            break
        at = item.end() + 1
    return items


def _digits(text: str) -> int | None:
    bare = text.removeprefix("-")
    return int(text) if bare.isascii() and bare.isdigit() and len(bare) <= len(str(1 << 63)) else None


def _typed(column: TableColumn, text: str) -> Any:
    """Parse a value of the column's kind. Raises ValueError or OverflowError."""
    if column.kind in INTEGER_BITS:
        value, bits = _digits(text), INTEGER_BITS[column.kind]
        return value if value is not None and -(1 << bits) <= value < 1 << bits else _refuse(text)
    if column.kind == "uuid":
        return str(UUID(text))
    if column.kind == "bool":
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _refuse(text)
    if column.kind == "instant":
        return instant_text(instant(text))
    if column.kind == "float":
        number = float(text if NUMBER.fullmatch(text) else _refuse(text))
        return number if number - number == 0 else _refuse(text)
    return text if not UNSTORABLE.search(text) else _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)


# Keyset pagination: a position is the sort value and the id of the last row that was read.
#
# Invariant: the row at a position may have been deleted, and inserts do not shift positions: a client that follows the
# links sees each row whose sort value does not change exactly once.


@dataclass(frozen=True, slots=True)
class KeysetPosition:
    """`value` as the database returns it, timestamps and UUIDs as text; None for null, and when sorting by id.
    `of_row`: the value is too long for a link and must be looked up in the row.
    """

    id: int
    value: Any = None
    of_row: bool = False

    def token(self, sort_by: str) -> str:
        """The opaque `after` parameter of a link."""
        value = repr(self.value) if isinstance(self.value, float) else self.value
        if isinstance(value, str) and len(value) > MAX_PLACE_CHARACTERS:
            value = []
        return base64.urlsafe_b64encode(json.dumps([sort_by, value, self.id]).encode()).decode().rstrip("=")


def _place(token: str, column: TableColumn) -> KeysetPosition:
    """Parse a token. Raises ValueError unless it is for a position in the order by this column."""
    padded = token + "=" * (-len(token) % 4)
    sort_by, value, id_ = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    if sort_by != column.name or type(id_) is not int or not 0 <= id_ <= MAX_ID:
        raise ValueError(token)
    if value is None or value == []:
        return KeysetPosition(id_, of_row=value == [])
    if column.kind == "float":
        return KeysetPosition(id_, float(value))  # also NaN and infinity, which other programs may have stored
    if column.kind == "instant" and FAR.fullmatch(value):
        return KeysetPosition(id_, value)
    return KeysetPosition(id_, _typed(column, str(value)))


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of one table that match all `filters`, sorted, starting after a position. One row more than `limit` is read.

    `columns`: the columns of the answer; `given`: the query string of the request; `bom` and `formula_safe` make CSV
    for spreadsheets.
    """

    table: Table
    format: Format
    limit: int
    offset: int
    sort_by: TableColumn
    descending: bool
    after: KeysetPosition | None
    filters: Sequence[ColumnFilter]
    columns: Sequence[TableColumn]
    given: Sequence[tuple[str, str]] = ()
    bom: bool = False
    formula_safe: bool = False

    def is_made(self, dialect: Dialect) -> bool:
        """Whether the database builds the JSON of each row. In SQLite this is cheaper than returning the values one by
        one. But it writes floats with only 15 digits, re-parses JSON values, and builds every row's JSON before it
        sorts.
        """
        is_json = dialect == "sqlite" and self.format in ("json", "ndjson") and self.sort_by.name == "id"
        return is_json and not any(column.kind in ("float", "json") for column in self.columns)

    def rows_sql(self, dialect: Dialect) -> tuple[str, Params]:
        """SQL for the rows: the columns in order, then those of `KeysetPosition` that are not among them; or id and
        JSON if the database builds it.
        """
        if self.is_made(dialect):
            flag = "json(CASE {0} WHEN 1 THEN 'true' WHEN 0 THEN 'false' END)"
            values = {
                column.name: (flag if column.kind == "bool" else "{0}").format(column.name) for column in self.columns
            }
            pairs = ", ".join(f"'{name}', {value}" for name, value in values.items())
            return self._sql(f"id, json_object({pairs}) AS line", dialect, self.limit + 1, self.offset)
        read = ", ".join(_read(column, dialect) for column in self._read_columns())
        return self._sql(read, dialect, self.limit + 1, self.offset)

    def edge_sql(self, dialect: Dialect) -> tuple[str, Params]:
        """SQL for the id and sort value of the page's last row and of the row after it, if they exist."""
        read = ", ".join(("id", _read(self.sort_by, dialect)) if self.sort_by.name != "id" else ("id",))
        return self._sql(read, dialect, 2, self.offset + self.limit - 1)

    def place_sql(self) -> tuple[str, Params]:
        """SQL for the sort value of the row at a position that lacks the value."""
        found = f"SELECT {self.sort_by.name} AS value FROM {self.table.name} WHERE id = :after_id"  # noqa: S608
        return found, {"after_id": self.after.id if self.after else None}

    def count_sql(self, dialect: Dialect) -> tuple[str, Params]:
        """SQL for the number of rows that match the filters, regardless of the page."""
        conditions, params = conditions_of(self.filters, dialect)
        return f"SELECT count(*) AS total FROM {self.table.name}{_where(conditions)}", params  # noqa: S608 - declared

    def place_of(self, row: Sequence[Any], dialect: Dialect) -> KeysetPosition:
        """The position of a row read by `rows_sql`."""
        if self.is_made(dialect):
            return KeysetPosition(row[0])
        names = [column.name for column in self._read_columns()]
        return self.edge_place([row[names.index(name)] for name in ("id", self.sort_by.name)])

    def edge_place(self, row: Sequence[Any]) -> KeysetPosition:
        """The position of a row read by `edge_sql`."""
        value = row[-1] if self.sort_by.name != "id" else None
        is_flag = self.sort_by.kind == "bool" and value is not None
        return KeysetPosition(row[0], bool(value) if is_flag else value)

    def content_range(self, total: int) -> str:
        """The Content-Range: which of `total` rows the answer has; after a position only the total is known."""
        last = min(self.offset + self.limit, total) - 1
        return f"*/{total}" if self.after or last < self.offset else f"{self.offset}-{last}/{total}"

    def next_page(self, path: str, after: KeysetPosition) -> str:
        """The URL of the next page; its cost does not grow with the distance from the first page."""
        kept = [(name, value) for name, value in self.given if name not in ("offset", "after", "after_id")]
        by_id = self.sort_by.name == "id"
        place = ("after_id", str(after.id)) if by_id else ("after", after.token(self.sort_by.name))
        return f"{path}?{urlencode([*kept, place])}"

    def _read_columns(self) -> Sequence[TableColumn]:
        names = {column.name for column in self.columns}
        hidden = {"id": self.table.stored[0], self.sort_by.name: self.sort_by}
        return [*self.columns, *(column for name, column in hidden.items() if name not in names)]

    def _sql(self, read: str, dialect: Dialect, limit: int, offset: int) -> tuple[str, Params]:
        conditions, params = conditions_of(self.filters, dialect)
        if self.after is not None:
            condition, place = self._behind(self.after, dialect)
            conditions, params = [*conditions, condition], {**params, **place}
        direction = "DESC" if self.descending else "ASC"
        order = f"id {direction}"
        if self.sort_by.name != "id":
            order = f"{_ordered(self.sort_by, dialect, self.table)} {direction} NULLS LAST, {order}"
        return (
            f"SELECT {read} FROM {self.table.name}{_where(conditions)} ORDER BY {order} "  # noqa: S608 - declared
            "LIMIT :row_limit OFFSET :row_offset"
        ), {**params, "row_limit": limit, "row_offset": offset}

    def _behind(self, after: KeysetPosition, dialect: Dialect) -> tuple[str, Params]:
        """The condition for rows after a position. Nulls are last in both directions."""
        sign = "<" if self.descending else ">"
        behind_id = f"id {sign} :after_id"
        column = _ordered(self.sort_by, dialect)
        if self.sort_by.name == "id":
            return behind_id, {"after_id": after.id}
        if after.value is None:
            return f"({column} IS NULL AND {behind_id})", {"after_id": after.id}
        value = f":after_value{CASTS.get(self.sort_by.kind, '') if dialect == 'postgres' else ''}"
        behind = f"({column} {sign} {value} OR ({column} = {value} AND {behind_id}) OR {column} IS NULL)"
        return behind, {"after_id": after.id, "after_value": after.value}


def conditions_of(filters: Sequence[ColumnFilter], dialect: Dialect) -> tuple[Sequence[str], Params]:
    """The conditions of all filters, and their parameters."""
    made = [each.sql(dialect, f"filter_{number}") for number, each in enumerate(filters)]
    return [condition for condition, _ in made], {name: value for _, some in made for name, value in some.items()}


def _where(conditions: Sequence[str]) -> str:
    return f" WHERE {' AND '.join(conditions)}" if conditions else ""


def _ordered(column: TableColumn, dialect: Dialect, table: Table | None = None) -> str:
    """The column as compared: text bytewise, in both databases. `table` qualifies it if an output has the same name."""
    collation = ' COLLATE "C"' if column.kind == "text" and dialect == "postgres" else ""
    return f"{f'{table.name}.' if table else ''}{column.name}{collation}"


def _read(column: TableColumn, dialect: Dialect) -> str:
    """SQL that reads the column as a plain value, the same in both databases."""
    if dialect == "sqlite":
        return column.name
    if column.kind == "instant":
        near = f"""to_char({column.name}, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
        # Other programs may have stored infinity, which to_char makes null, or dates whose era it leaves out.
        is_near = f"{column.name} BETWEEN '0001-01-01' AND '9999-12-31 23:59:59.999999'"
        return f"CASE WHEN {is_near} THEN {near} ELSE {column.name}::text END AS {column.name}"
    return f"{column.name}::text AS {column.name}" if column.kind in ("uuid", "json") else column.name


def selection(table: Table, given: Sequence[tuple[str, str]]) -> Selection:
    """Parse the query string. Raises Refused: 400 for unknown names or options, 422 for a value out of range."""
    options = single(given, OPTIONS)
    format_ = _one_of(options, "format", FORMATS)
    limit = _whole(options, "limit", **({"maximum": MAX_ROWS} if format_ == "json" else {}))
    offset = _whole(options, "offset")
    sortable = {column.name: column for column in table.stored if column.kind != "json"}
    sort_by = sortable[_one_of(options, "sort_by", tuple(sortable))]
    return Selection(
        table=table,
        format=format_,  # type: ignore[arg-type]
        limit=DEFAULT_ROWS if limit is None else limit,
        offset=offset or 0,
        sort_by=sort_by,
        descending=_one_of(options, "sort_dir", DIRECTIONS) == "desc",
        after=_after(options, sort_by),
        filters=filters_of(table, given, OPTIONS),
        columns=_columns(table, options.get("select", "*")),
        given=given,
        bom=flag(options, "bom"),
        formula_safe=flag(options, "formula_safe"),
    )


@dataclass(frozen=True, slots=True)
class Erasure:
    """Which rows to delete. `forget`: allow their natural keys, all listed in `keys`, to be inserted again."""

    table: Table
    filters: Sequence[ColumnFilter]
    keys: Sequence[str]
    forget: bool = False
    dry_run: bool = False


def erasure(table: Table, given: Sequence[tuple[str, str]]) -> Erasure:
    """Parse the query string of a DELETE. Raises Refused, also if there is no filter, since that would delete every
    row.
    """
    options = single(given, ERASURE_OPTIONS)
    forget, dry_run = flag(options, "forget"), flag(options, "dry_run")
    filters = filters_of(table, given, ERASURE_OPTIONS)
    if not filters:
        what = "a DELETE without a filter would delete every row"
        raise Refused(400, what, f"name the rows, such as ?{table.key.name}=eq.…")
    lists = [each for each in filters if each.operator in ("eq", "in") and not each.negated]
    named = [each for each in lists if each.column == table.key]
    if forget and (len(filters) > 1 or not named):
        what = f"forget takes one filter, {table.key.name}=eq.… or in.(…): only natural keys are remembered"
        raise Refused(422, what, "name the keys", "forget")
    return Erasure(table, filters, [str(value) for each in named for value in each.values], forget, dry_run)


def flag(options: Mapping[str, str], name: str) -> bool:
    """A boolean option; false when absent. Raises Refused."""
    value = YES_NO.get(options.get(name, "false").lower())
    if value is None:
        raise Refused(422, f"{name} is not true or false", "correct it", name)
    return value


def single(given: Sequence[tuple[str, str]], names: Collection[str]) -> Mapping[str, str]:
    """The options among the parameters. Raises Refused for a repeated option."""
    options: dict[str, str] = {}
    for name, value in given:
        if name in options:
            raise Refused(422, f"{name} is given twice", "give each option once", name)
        if name in names:
            options[name] = value
    return options


def filters_of(table: Table, given: Sequence[tuple[str, str]], options: Collection[str]) -> Sequence[ColumnFilter]:
    """The filters among the parameters: all except the options; `pk` is an alias of `id`. Raises Refused."""
    columns, filters = {column.name: column for column in table.stored}, list[ColumnFilter]()
    for name, text in given:
        if name == "pk":
            try:
                filters.append(ColumnFilter(columns["id"], "eq", [_typed(columns["id"], text)]))
            except ValueError:
                raise _wrong("pk", f"must be {columns['id'].wanted}") from None
        elif name not in options:
            if name not in columns:
                what = f"unknown column or parameter {name[:80]}"
                raise Refused(400, what, "see /docs for the columns of this table", name[:80])
            filters.append(filter_of(columns[name], text))
    return filters


def _columns(table: Table, select: str) -> Sequence[TableColumn]:
    columns = {column.name: column for column in table.stored}
    names = [name.strip() for name in select.split(",")]
    if "*" in names and len(names) == 1:
        return table.stored
    for name in names:
        if name not in columns or names.count(name) > 1:
            what = f"select names {name[:80]!r}, which is {'there twice' if name in columns else 'an unknown column'}"
            raise Refused(400, what, "name columns of this table, separated by commas, or *", "select")
    return [columns[name] for name in names]


def _after(options: Mapping[str, str], sort_by: TableColumn) -> KeysetPosition | None:
    after_id = _whole(options, "after_id")
    name = "after" if "after" in options else "after_id"
    if after_id is None and name == "after_id":
        return None
    if options.get("offset", "0") != "0" or (name == "after" and after_id is not None):
        raise Refused(422, f"{name} works without offset, and alone", "leave one out", name)
    if name == "after_id":
        if sort_by.name != "id":
            what = "after_id works with the order by id only"
            raise Refused(422, what, 'use after, as the link with rel="next" has it', name)
        return KeysetPosition(after_id or 0)
    try:
        return _place(options["after"], sort_by)
    except (ValueError, TypeError, OverflowError, RecursionError):
        what = "after is not a position in this order"
        raise Refused(422, what, 'take it from the link with rel="next"', "after") from None


def _one_of(options: Mapping[str, str], name: str, allowed: Sequence[str]) -> str:
    """The option's value; the first of `allowed` is the default."""
    value = options.get(name, allowed[0])
    if value not in allowed:
        raise Refused(400, f"{name} is not one of {', '.join(allowed)}", "use one of these", name)
    return value


def _whole(options: Mapping[str, str], name: str, **limits: int) -> int | None:
    if name not in options:
        return None
    declared = {**OPTIONS[name], **limits}
    value, least, most = _digits(options[name]), declared["minimum"], declared["maximum"]
    if value is None or not least <= value <= most:
        raise Refused(422, f"{name} is not a whole number from {least} to {most}", "correct it", name)
    return value
