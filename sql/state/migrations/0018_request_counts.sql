-- Requests that an outside system charges for, by hour and kind. Valid in SQLite and PostgreSQL.

CREATE TABLE request_counts (
    hour_at  TIMESTAMPTZ      NOT NULL,
    kind     TEXT             NOT NULL,
    requests DOUBLE PRECISION NOT NULL,
    first_at TIMESTAMPTZ      NOT NULL,
    last_at  TIMESTAMPTZ      NOT NULL,
    PRIMARY KEY (hour_at, kind)
);
