-- Days of which closed windows are no longer recorded one by one. Valid in SQLite and PostgreSQL.

-- The objects say all else that such records did. `windows`: second of the day at which a window starts -> its rows, as JSON.
CREATE TABLE export_days (
    pipeline  TEXT        NOT NULL,
    device_id TEXT        NOT NULL,
    day_at    TIMESTAMPTZ NOT NULL,
    windows   TEXT        NOT NULL,
    PRIMARY KEY (pipeline, device_id, day_at)
);

CREATE INDEX export_days_by_day ON export_days (pipeline, day_at);
