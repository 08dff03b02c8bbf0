"""The tables of the state in PostgreSQL, after somebody emptied or dropped some of them.

Invariant: nothing is made, changed or removed here but the record of migrations, and that only where all tables and
columns are there.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from app.stores.migrations import CREATE_TABLE, LOCK, RECORD, TABLE_EXISTS, Migration, migrations, recorded
from app.stores.sql import Damaged, Database
from app.stores.state_file import schema_after

COLUMNS = """
SELECT c.relname AS name, a.attname AS col
FROM pg_class AS c INNER JOIN pg_attribute AS a ON a.attrelid = c.oid
WHERE c.relkind = 'r' AND pg_table_is_visible(c.oid) AND a.attnum > 0 AND NOT a.attisdropped
"""


class StateTables:
    """See `app.stores.migrations.Rebuilt`. Tables that are gone while others are there are a person's to bring back."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder

    def check(self, wanted: Sequence[Migration]) -> None:
        """Record the migrations of tables that are all there without any record: to make them again would fail.

        Raises Damaged when a table or a column is missing though its migration was applied.
        """
        with self._database.transaction() as session:
            session.rows("SELECT pg_advisory_xact_lock(:lock)", lock=LOCK)
            names = recorded(session, "postgres")
            there = {(row["name"], row["col"]) for row in session.rows(COLUMNS)}
            done = {each.name for each in wanted if each.name in names}
            # The tables and columns of both dialects are the same.
            model = [each for each in migrations(self._folder, "sqlite") if not done or each.name in done]
            missing = {(name, col) for kind, name, col in schema_after(model) if kind == "table"} - there
            if done and missing:
                table, col = min(missing, key=str)
                raise Damaged(
                    f"{self._database.place}: table {table} ({col}) is missing, though its migration was applied"
                )
            if not done and not missing:
                if not session.rows(TABLE_EXISTS["postgres"]):
                    session.run(CREATE_TABLE)
                session.run_many(RECORD, [{"name": each.name, "checksum": each.checksum} for each in wanted])

    def move_aside(self, error: Damaged, look: Callable[[], None]) -> None:  # noqa: ARG002 - the port's
        """Nothing is moved. Raises Damaged unless `look` finds everything in order by now."""
        look()

    def made(self) -> None:
        """Nothing to do."""
