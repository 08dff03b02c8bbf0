"""SQL that follows from the declaration of a table: its DDL for both databases, and the upsert of each.

Invariants: the migrations in `sql/dwh/migrations` are these very texts, which a test checks; every name in them comes
from the declaration, never from a caller.
"""

from app.db.database import Dialect
from app.dwh.tables import TABLES, Kind, Table, TableColumn

TYPES: dict[Dialect, dict[Kind, str]] = {
    "postgres": {
        "uuid": "uuid",
        "text": "text",
        "integer": "integer",
        "bigint": "bigint",
        "float": "double precision",
        "bool": "boolean",
        "json": "jsonb",
        "instant": "timestamptz",
    },
    "sqlite": {
        "uuid": "TEXT",
        "text": "TEXT",
        "integer": "INTEGER",
        "bigint": "INTEGER",
        "float": "REAL",
        "bool": "INTEGER",
        "json": "TEXT",
        "instant": "TEXT",
    },
}
IDENTITY: dict[Dialect, str] = {
    "postgres": "id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    "sqlite": "id INTEGER PRIMARY KEY AUTOINCREMENT",
}
# In SQLite the text has the width of every instant that we write, so that its order is the order in time.
SQLITE_NOW = "strftime('%Y-%m-%dT%H:%M:%f000Z', 'now')"
CREATED: dict[Dialect, str] = {
    "postgres": "created_at timestamptz NOT NULL DEFAULT now()",
    "sqlite": f"created_at TEXT NOT NULL DEFAULT ({SQLITE_NOW})",
}
ORDINAL = "n"


def migration(dialect: Dialect) -> str:
    """The text of the first migration."""
    return "\n".join(create(table, dialect) for table in TABLES)


def create(table: Table, dialect: Dialect) -> str:
    """CREATE TABLE."""
    lines = [IDENTITY[dialect], *(_column(column, dialect) for column in table.columns), CREATED[dialect]]
    body = ",\n    ".join(lines)
    return f"CREATE TABLE {table.name} (\n    {body}\n){' STRICT' if dialect == 'sqlite' else ''};\n"


def _column(column: TableColumn, dialect: Dialect) -> str:
    words = [column.name, TYPES[dialect][column.kind]]
    if column.required:
        words.append("NOT NULL UNIQUE")
    if column.default is not None:
        words.append(f"NOT NULL DEFAULT {str(column.default).upper()}")
    return " ".join(words)


def stage(table: Table) -> str:
    """The name of the temporary table that takes rows in PostgreSQL, where COPY knows no conflicts."""
    return f"staged_{table.name}"


def create_stage(table: Table) -> str:
    """A temporary table per connection, made once; it is empty whenever a transaction begins to use it.

    The server numbers the rows as they come, which costs less than to send their numbers.
    """
    types = TYPES["postgres"]
    columns = ", ".join(f"{each.name} {types[each.kind]}" for each in table.columns)
    ordinal = f"{ORDINAL} bigint GENERATED ALWAYS AS IDENTITY"
    return f"CREATE TEMP TABLE IF NOT EXISTS {stage(table)} ({ordinal}, {columns}) ON COMMIT DELETE ROWS"


def empty_stage(table: Table) -> str:
    """Remove what was staged, at no cost per row."""
    return f"TRUNCATE {stage(table)}"


def merge(table: Table) -> str:
    """The upsert of all staged rows, in the order in which they came; `ids` of the rows it wrote, as one text."""
    columns = ", ".join(table.names)
    return (
        f"WITH written AS (INSERT INTO {table.name} ({columns}) "  # noqa: S608 - declared
        f"SELECT {columns} FROM {stage(table)} ORDER BY {ORDINAL} {_on_conflict(table)} RETURNING id) "
        "SELECT coalesce(string_agg(id::text, ','), '') AS ids FROM written"
    )


def merge_all(table: Table, *, past: bool) -> str:
    """As `merge`, without the ids. Rows of the `past` add what is not known yet."""
    columns = ", ".join(table.names)
    return (
        f"INSERT INTO {table.name} ({columns}) SELECT {columns} FROM {stage(table)} ORDER BY {ORDINAL} "  # noqa: S608
        f"{_on_conflict(table, past=past)}"
    )


def upsert(table: Table, *, past: bool = False) -> str:
    """The upsert of one row, its values bound in order. One of the `past` adds what is not known yet."""
    places = ", ".join("?" * len(table.columns))
    conflict = _on_conflict(table, past=past)
    return f"INSERT INTO {table.name} ({', '.join(table.names)}) VALUES ({places}) {conflict}"  # noqa: S608


def upsert_many(table: Table, rows: int) -> str:
    """The upsert of several rows in SQLite: bound are `created_at` of all, then their values in order.

    Many rows a statement, and an instant that is not made for each of them, take a third of the time away.
    """
    places = ", ".join([f"(?1{', ?' * len(table.columns)})"] * rows)
    names = ", ".join(("created_at", *table.names))
    return f"INSERT INTO {table.name} ({names}) VALUES {places} {_on_conflict(table)}"  # noqa: S608 - declared


def newest(table: Table) -> str:
    """The largest id, 0 for none."""
    return f"SELECT coalesce(max(id), 0) AS newest FROM {table.name}"  # noqa: S608 - declared


def newer(table: Table) -> str:
    """The ids above `:newest`, in order."""
    return f"SELECT id FROM {table.name} WHERE id > :newest ORDER BY id"  # noqa: S608 - declared


def newer_own(table: Table) -> str:
    """As `newer` in PostgreSQL, without rows that came from elsewhere: `now()` is when the transaction began."""
    return f"SELECT id FROM {table.name} WHERE id > :newest AND created_at = now() ORDER BY id"  # noqa: S608 - declared


def span(table: Table) -> str:
    """The first and the last id above `:newest`, null for none. Two searches in the index, however many there are."""
    of = f"FROM {table.name} WHERE id > :newest"
    return f"SELECT (SELECT min(id) {of}) AS first, (SELECT max(id) {of}) AS last"


def known(table: Table) -> str:
    """Whether one of `:keys` is there, in PostgreSQL."""
    keys = f":keys::{TYPES['postgres'][table.key.kind]}[]"
    return f"SELECT EXISTS (SELECT FROM {table.name} WHERE {table.key.name} = ANY({keys})) AS known"  # noqa: S608


def _on_conflict(table: Table, *, past: bool = False) -> str:
    first, second = (table.name, "excluded") if past else ("excluded", table.name)
    taken = ", ".join(f"{name} = coalesce({first}.{name}, {second}.{name})" for name in table.names[1:])
    return f"ON CONFLICT ({table.key.name}) DO {f'UPDATE SET {taken}' if table.updates else 'NOTHING'}"
