"""SQL that follows from the declaration of a table: its DDL for both databases, staging, and the upsert.

Invariants: the migrations in `sql/dwh/migrations` are these very texts, which a test checks; every name in them comes
from the declaration, never from a caller.
"""

from app.dwh.tables import TABLES, Column, Kind, Table
from app.stores.sql import Dialect

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
CREATED: dict[Dialect, str] = {
    "postgres": "created_at timestamptz NOT NULL DEFAULT now()",
    "sqlite": "created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%f000Z', 'now'))",
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


def _column(column: Column, dialect: Dialect) -> str:
    words = [column.name, TYPES[dialect][column.kind]]
    if column.required:
        words.append("NOT NULL UNIQUE")
    if column.default is not None:
        words.append(f"NOT NULL DEFAULT {str(column.default).upper()}")
    return " ".join(words)


def stage(table: Table) -> str:
    """The name of the temporary table that takes rows before they are merged."""
    return f"staged_{table.name}"


def create_stage(table: Table, dialect: Dialect) -> str:
    """A temporary table per connection, made once; it is empty whenever a transaction begins to use it."""
    types = TYPES[dialect]
    columns = ", ".join(
        [f"{ORDINAL} {types['bigint']}", *(f"{each.name} {types[each.kind]}" for each in table.columns)]
    )
    end = " ON COMMIT DELETE ROWS" if dialect == "postgres" else ""
    return f"CREATE TEMP TABLE IF NOT EXISTS {stage(table)} ({columns}){end}"


def empty_stage(table: Table, dialect: Dialect) -> str:
    """Remove what was staged, at no cost per row."""
    return f"TRUNCATE {stage(table)}" if dialect == "postgres" else f"DELETE FROM {stage(table)}"  # noqa: S608


def merge(table: Table) -> str:
    """As `upsert`; gives the id of each row it wrote."""
    return f"{upsert(table)} RETURNING id"


def upsert(table: Table, *, past: bool = False) -> str:
    """The upsert of all staged rows, in the order in which they came. Rows of the `past` add what is not known yet.

    `WHERE true` tells SQLite that ON does not begin a join.
    """
    columns = ", ".join(table.names)
    key = table.key.name
    first, second = (table.name, "excluded") if past else ("excluded", table.name)
    taken = ", ".join(f"{name} = coalesce({first}.{name}, {second}.{name})" for name in table.names[1:])
    action = f"UPDATE SET {taken}" if table.updates else "NOTHING"
    return (
        f"INSERT INTO {table.name} ({columns}) SELECT {columns} FROM {stage(table)} WHERE true ORDER BY {ORDINAL} "  # noqa: S608
        f"ON CONFLICT ({key}) DO {action}"
    )
