-- What /analytics sums of the objects of a closed day moves into the day's row. Valid in SQLite and PostgreSQL.

-- `folder`: where these objects lie; `objects`: how many versions of them; `facts`: see `app.db.packed_days`. SQLite takes bytes
-- in a column of any type.
ALTER TABLE export_days ADD COLUMN folder TEXT NOT NULL DEFAULT '';
ALTER TABLE export_days ADD COLUMN objects INTEGER NOT NULL DEFAULT 0;
ALTER TABLE export_days ADD COLUMN facts BYTEA;

CREATE INDEX export_days_by_folder ON export_days (folder) WHERE objects > 0;
CREATE INDEX export_days_by_device ON export_days (device_id, day_at) WHERE objects > 0;
