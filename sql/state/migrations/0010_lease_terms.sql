-- For how long a lease was given, so that one whose time lies further ahead than that is known to come from a clock that was
-- ahead. Null: not known. Valid in SQLite and PostgreSQL.

ALTER TABLE leases ADD COLUMN ttl_seconds DOUBLE PRECISION;
