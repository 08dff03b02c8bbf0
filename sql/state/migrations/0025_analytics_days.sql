-- What /analytics knows of objects of days that are over, all of one device and UTC day in one row: 30 bytes an object instead
-- of 550. Valid in SQLite and PostgreSQL.

-- `device` and `day` are those of analytics_parts. What is there already is packed by the daemon, a part at a time.
-- `etags`: 16 bytes of each, in the order of the keys; empty where ETags are no digests. `packed`: zlib over JSON, see
-- `app.db.object_summaries.DayPack`.
CREATE TABLE analytics_days (
    device TEXT    NOT NULL,
    day    INTEGER NOT NULL,
    etags  BYTEA   NOT NULL,
    packed BYTEA   NOT NULL,
    PRIMARY KEY (device, day)
);
