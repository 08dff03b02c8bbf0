-- Natural keys of rows that were deleted on request, so that pulls and repeated posts do not bring them back.
CREATE TABLE dwh_deleted (
    table_name TEXT NOT NULL,
    key TEXT NOT NULL,
    deleted_at TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (table_name, key)
);
