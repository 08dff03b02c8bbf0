"""The declaration is the one source: migrations and documentation follow from it."""

import pytest

from app.db.database import DIALECTS, Dialect, sql_directory
from app.dwh.openapi import row, stored_row
from app.dwh.tables import POSTGRES_TYPES, SQLITE_NOW, TABLES, Kind, Table, TableColumn

DOCUMENTED = {
    "events-part": "events_part",
    "mobile-devices": "mobile_devices",
    "permanent-user-properties": "permanent_user_properties",
    "technical-data": "technical_data",
    "event-properties": "tmp_event_properties",
    "user-properties": "tmp_user_properties",
    "user-locations": "user_locations",
}


TYPES: dict[Dialect, dict[Kind, str]] = {
    "postgres": POSTGRES_TYPES,
    "sqlite": {
        **dict.fromkeys(("uuid", "text", "json", "instant"), "TEXT"),
        **dict.fromkeys(("integer", "bigint", "bool"), "INTEGER"),
        "float": "REAL",
    },
}
IDENTITY: dict[Dialect, str] = {
    "postgres": "id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    "sqlite": "id INTEGER PRIMARY KEY AUTOINCREMENT",
}
CREATED: dict[Dialect, str] = {
    "postgres": "created_at timestamptz NOT NULL DEFAULT now()",
    "sqlite": f"created_at TEXT NOT NULL DEFAULT ({SQLITE_NOW})",
}


def created(table: Table, dialect: Dialect) -> str:
    lines = [IDENTITY[dialect], *(declared(column, dialect) for column in table.columns), CREATED[dialect]]
    body = ",\n    ".join(lines)
    return f"CREATE TABLE {table.name} (\n    {body}\n){' STRICT' if dialect == 'sqlite' else ''};\n"


def declared(column: TableColumn, dialect: Dialect) -> str:
    words = [column.name, TYPES[dialect][column.kind]]
    if column.required:
        words.append("NOT NULL UNIQUE")
    if column.default is not None:
        words.append(f"NOT NULL DEFAULT {str(column.default).upper()}")
    return " ".join(words)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_first_migration_is_what_the_declaration_says(dialect: Dialect) -> None:
    path = sql_directory() / "dwh" / "migrations" / f"0001_tables.{dialect}.sql"
    assert path.read_text(encoding="utf-8") == "\n".join(created(table, dialect) for table in TABLES)


def test_the_seven_routes_are_the_documented_ones() -> None:
    assert {table.path: table.name for table in TABLES} == DOCUMENTED


def test_the_first_column_of_each_table_is_its_only_required_one() -> None:
    for table in TABLES:
        assert [column.required for column in table.columns] == [True] + [False] * (len(table.columns) - 1)
        assert row(table)["required"] == [table.key.name]
        assert list(stored_row(table)["properties"]) == ["id", *table.names, "created_at"]


def test_locks_and_names_are_told_apart() -> None:
    assert len({table.number for table in TABLES}) == len({table.name for table in TABLES}) == 7
