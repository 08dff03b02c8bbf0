-- What the reconcile compares and finds. Valid in SQLite and PostgreSQL.

-- What the values of each field of the source came to when the window was closed, as JSON; '' for open windows and for
-- records of older versions.
ALTER TABLE export_windows ADD COLUMN source_sums TEXT NOT NULL DEFAULT '';

-- What the last listing showed instead of the object: 'missing', or 'foreign' for a version that Headwater did not write.
ALTER TABLE export_windows ADD COLUMN trouble TEXT NOT NULL DEFAULT '';
CREATE INDEX export_windows_trouble ON export_windows (pipeline, trouble) WHERE trouble <> '';

-- Deltas of older versions that are part of their window's object by now, and could not be deleted.
CREATE TABLE undeleted_objects (
    pipeline TEXT NOT NULL,
    s3_key   TEXT NOT NULL,
    error    TEXT NOT NULL,
    PRIMARY KEY (pipeline, s3_key)
);

-- Rows of closed windows that were corrected at the source.
ALTER TABLE runs ADD COLUMN corrected_rows BIGINT NOT NULL DEFAULT 0;
ALTER TABLE job_totals ADD COLUMN corrected_rows BIGINT NOT NULL DEFAULT 0;
