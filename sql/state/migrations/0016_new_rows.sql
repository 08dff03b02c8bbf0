-- What the pages show: rows as people count them, by quarter of an hour, and which problems were dismissed. Valid in SQLite
-- and PostgreSQL.

-- Rows that a run put where there were none before; a rewrite of an open window does not count again.
ALTER TABLE runs ADD COLUMN new_rows BIGINT NOT NULL DEFAULT 0;
ALTER TABLE job_totals ADD COLUMN new_rows BIGINT NOT NULL DEFAULT 0;

-- Up to now only rewrites and new rows together were counted: begin with what the destination holds.
UPDATE job_totals
SET
    new_rows = coalesce(
        (SELECT sum(w.record_count) FROM export_windows AS w WHERE w.pipeline = job_totals.job),
        (SELECT t.total FROM ledger_totals AS t WHERE t.job = job_totals.job AND t.entry = 'new' AND t.reason = ''),
        0
    )
WHERE outcome = 'ok';

-- A quarter of an hour, since every time zone begins its day on one.
CREATE TABLE rows_by_time (
    job          TEXT        NOT NULL,
    slot_at      TIMESTAMPTZ NOT NULL,
    new_rows     BIGINT      NOT NULL,
    updated_rows BIGINT      NOT NULL,
    runs         BIGINT      NOT NULL,
    failed_runs  BIGINT      NOT NULL,
    PRIMARY KEY (job, slot_at)
);

CREATE TABLE dismissed_problems (
    problem_id   TEXT        NOT NULL PRIMARY KEY,
    dismissed_at TIMESTAMPTZ NOT NULL,
    dismissed_by TEXT        NOT NULL
);
