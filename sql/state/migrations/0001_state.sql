-- Checkpoints, leases, runs and layouts. Valid in SQLite and PostgreSQL; SQLite keeps TIMESTAMPTZ as text of fixed width.

-- One row per pipeline and partition. The partition '' is the pipeline itself.
CREATE TABLE export_checkpoints (
    pipeline          TEXT        NOT NULL,
    device_id         TEXT        NOT NULL,
    last_exported_at  TIMESTAMPTZ,
    high_watermark_at TIMESTAMPTZ,
    status            TEXT        NOT NULL CHECK (status IN ('ok', 'error')),
    s3_key            TEXT,
    record_count      BIGINT,
    error_message     TEXT,
    created_at        TIMESTAMPTZ NOT NULL,
    updated_at        TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (pipeline, device_id)
);

-- One row per confirmed object. Part 0 is the window's object, 1 and up are its deltas of late rows.
CREATE TABLE export_windows (
    pipeline     TEXT        NOT NULL,
    device_id    TEXT        NOT NULL,
    window_start TIMESTAMPTZ NOT NULL,
    part         INTEGER     NOT NULL,
    window_end   TIMESTAMPTZ NOT NULL,
    s3_key       TEXT        NOT NULL,
    version      TEXT        NOT NULL,
    digest       TEXT        NOT NULL,
    record_count BIGINT      NOT NULL,
    size_bytes   BIGINT      NOT NULL,
    source_cells BIGINT      NOT NULL,
    min_at       TIMESTAMPTZ,
    max_at       TIMESTAMPTZ,
    status       TEXT        NOT NULL CHECK (status IN ('open', 'closed')),
    updated_at   TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (pipeline, device_id, window_start, part)
);

-- Late rows are summed for the metrics; deltas are few, so this index stays small.
CREATE INDEX export_windows_deltas ON export_windows (pipeline) WHERE part > 0;

-- A released lease keeps its row, so that generations never start anew.
CREATE TABLE leases (
    name       TEXT        NOT NULL PRIMARY KEY,
    owner      TEXT        NOT NULL,
    generation BIGINT      NOT NULL,
    expires_at TIMESTAMPTZ NOT NULL
);

CREATE TABLE runs (
    run_id     TEXT        NOT NULL PRIMARY KEY,
    job        TEXT        NOT NULL,
    started_at TIMESTAMPTZ NOT NULL,
    ended_at   TIMESTAMPTZ,
    outcome    TEXT        NOT NULL,
    rows       BIGINT      NOT NULL,
    bytes      BIGINT      NOT NULL,
    windows    BIGINT      NOT NULL,
    late_rows  BIGINT      NOT NULL,
    failures   TEXT        NOT NULL,
    more       BOOLEAN     NOT NULL,
    error      TEXT        NOT NULL,
    hint       TEXT        NOT NULL
);

CREATE INDEX runs_of_job ON runs (job, started_at);
CREATE INDEX runs_by_start ON runs (started_at);

-- Which window length and format a pipeline's objects have, from which instant on.
CREATE TABLE layouts (
    pipeline       TEXT        NOT NULL,
    effective_from TIMESTAMPTZ NOT NULL,
    window_seconds BIGINT      NOT NULL,
    format         TEXT        NOT NULL,
    date_format    TEXT        NOT NULL,
    PRIMARY KEY (pipeline, effective_from)
);
