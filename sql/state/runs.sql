-- The record of runs.

-- name: save_run
-- Insert or replace the record of one run.
INSERT INTO runs (
    run_id, job, started_at, ended_at, outcome, rows, bytes, windows, late_rows, failures, more, error, hint
) VALUES (
    :run_id, :job, :started_at, :ended_at, :outcome, :rows, :bytes, :windows, :late_rows, :failures, :more, :error,
    :hint
)
ON CONFLICT (run_id) DO UPDATE SET
    job = excluded.job,
    started_at = excluded.started_at,
    ended_at = excluded.ended_at,
    outcome = excluded.outcome,
    rows = excluded.rows,
    bytes = excluded.bytes,
    windows = excluded.windows,
    late_rows = excluded.late_rows,
    failures = excluded.failures,
    more = excluded.more,
    error = excluded.error,
    hint = excluded.hint;

-- name: prune_runs
-- Keep the newest runs of a job. Without that many the inner query is NULL and nothing goes.
DELETE FROM runs
WHERE
    job = :job
    AND started_at < (
        SELECT started_at FROM runs WHERE job = :job ORDER BY started_at DESC LIMIT 1 OFFSET :kept_before
    );

-- name: recent_runs
-- The newest runs of all jobs.
SELECT * FROM runs ORDER BY started_at DESC, run_id DESC LIMIT :limit;

-- name: recent_runs_of_job
-- The newest runs of one job.
SELECT * FROM runs WHERE job = :job ORDER BY started_at DESC, run_id DESC LIMIT :limit;

-- name: last_ended
-- The newest run of a job that has ended.
SELECT * FROM runs WHERE job = :job AND ended_at IS NOT NULL ORDER BY started_at DESC, run_id DESC LIMIT 1;
