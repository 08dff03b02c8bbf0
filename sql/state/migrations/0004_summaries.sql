-- What /analytics knows of each version of each object, so that no version is read twice. Rows are never changed.

-- `object_id` is a digest of key and ETag. `fault` says why a version cannot be read; then it has no parts.
CREATE TABLE analytics_objects (
    object_id  TEXT   NOT NULL PRIMARY KEY,
    object_key TEXT   NOT NULL,
    etag       TEXT   NOT NULL,
    size_bytes BIGINT NOT NULL,
    row_count  BIGINT NOT NULL,
    schema_id  TEXT   NOT NULL,
    fault      TEXT   NOT NULL
);

-- Columns with their types as JSON, once for all objects that have the same.
CREATE TABLE analytics_schemas (
    schema_id TEXT NOT NULL PRIMARY KEY,
    columns   TEXT NOT NULL
);

-- Aggregates of the rows of one device and one UTC day in one version. `device` is JSON text, so that every id can be kept;
-- `day` counts from 1970-01-01; instants are microseconds since then; `latest` holds the values of the newest reading as JSON.
CREATE TABLE analytics_parts (
    object_id       TEXT             NOT NULL,
    place           INTEGER          NOT NULL,
    device          TEXT             NOT NULL,
    day             INTEGER          NOT NULL,
    row_count       BIGINT           NOT NULL,
    min_us          BIGINT,
    max_us          BIGINT,
    voltage_sum     DOUBLE PRECISION,
    voltage_count   BIGINT           NOT NULL,
    temperature_max DOUBLE PRECISION,
    soc_sum         DOUBLE PRECISION,
    soc_count       BIGINT           NOT NULL,
    latest          TEXT,
    PRIMARY KEY (object_id, place)
);

CREATE INDEX analytics_parts_of_day ON analytics_parts (device, day);

-- Grows with each removal of versions, so that another process notices that something it relied on may be gone.
CREATE TABLE analytics_sweeps (
    only_row INTEGER NOT NULL PRIMARY KEY CHECK (only_row = 1),
    sweeps   BIGINT  NOT NULL
);

INSERT INTO analytics_sweeps (only_row, sweeps) VALUES (1, 0);
