"""The state and the warehouse in SQL: SQLite and PostgreSQL, migrations, checkpoints, leases and run records."""
