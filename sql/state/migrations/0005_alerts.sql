-- What people were told and is not over yet, so that no process tells it again. Valid in SQLite and PostgreSQL.

CREATE TABLE open_alerts (
    job     TEXT        NOT NULL,
    event   TEXT        NOT NULL,
    told_at TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (job, event)
);
