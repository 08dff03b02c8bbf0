-- Run records.

-- name: save_run
-- Insert or replace the record of one run.
INSERT INTO runs (
    run_id, job, started_at, ended_at, outcome, rows, bytes, windows, late_rows, corrected_rows, new_rows, failures, more,
    error, hint, ledger
) VALUES (
    :run_id, :job, :started_at, :ended_at, :outcome, :rows, :bytes, :windows, :late_rows, :corrected_rows, :new_rows,
    :failures, :more, :error, :hint, :ledger
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
    corrected_rows = excluded.corrected_rows,
    new_rows = excluded.new_rows,
    failures = excluded.failures,
    more = excluded.more,
    error = excluded.error,
    hint = excluded.hint,
    ledger = excluded.ledger;

-- name: prune_runs
-- Keep a job's newest runs up to :until_at, and those after it. With fewer runs than that, the inner query is NULL and
-- nothing is deleted.
DELETE FROM runs
WHERE
    job = :job
    AND started_at < (
        SELECT started_at FROM runs WHERE job = :job AND started_at <= :until_at
        ORDER BY started_at DESC LIMIT 1 OFFSET :kept_before
    );

-- name: recent_runs
-- The newest runs of all jobs. Runs recorded by a clock that was ahead come last.
SELECT * FROM (
    SELECT 0 AS ahead, runs.* FROM runs WHERE started_at <= :until_at
    ORDER BY started_at DESC, run_id DESC LIMIT :limit
) AS known
UNION ALL
SELECT * FROM (
    SELECT 1 AS ahead, runs.* FROM runs WHERE started_at > :until_at
    ORDER BY started_at DESC, run_id DESC LIMIT :limit
) AS later
ORDER BY ahead, started_at DESC, run_id DESC
LIMIT :limit;

-- name: recent_runs_of_job
-- The newest runs of one job. Runs recorded by a clock that was ahead come last.
SELECT * FROM (
    SELECT 0 AS ahead, runs.* FROM runs WHERE job = :job AND started_at <= :until_at
    ORDER BY started_at DESC, run_id DESC LIMIT :limit
) AS known
UNION ALL
SELECT * FROM (
    SELECT 1 AS ahead, runs.* FROM runs WHERE job = :job AND started_at > :until_at
    ORDER BY started_at DESC, run_id DESC LIMIT :limit
) AS later
ORDER BY ahead, started_at DESC, run_id DESC
LIMIT :limit;

-- name: last_ended
-- The newest ended runs of a job. Runs recorded by a clock that was ahead come last.
SELECT * FROM (
    SELECT 0 AS ahead, runs.* FROM runs WHERE job = :job AND ended_at IS NOT NULL AND started_at <= :until_at
    ORDER BY started_at DESC, run_id DESC LIMIT :limit
) AS known
UNION ALL
SELECT * FROM (
    SELECT 1 AS ahead, runs.* FROM runs WHERE job = :job AND ended_at IS NOT NULL AND started_at > :until_at
    ORDER BY started_at DESC, run_id DESC LIMIT :limit
) AS later
ORDER BY ahead, started_at DESC, run_id DESC
LIMIT :limit;

-- name: last_done
-- The start of a job's newest completed run, without those recorded by a clock that was ahead.
SELECT started_at FROM runs
WHERE job = :job AND outcome IN ('ok', 'partial') AND started_at <= :until_at
ORDER BY started_at DESC
LIMIT 1;

-- name: is_counted
-- A row if this run has ended before, so its sums are already counted.
SELECT 1 AS found FROM runs WHERE run_id = :run_id AND ended_at IS NOT NULL;

-- name: correct_totals
-- A job's runs end one after another: one that seems to end after the current run was recorded by a clock that was
-- ahead.
UPDATE job_totals SET ended_at = :ended_at WHERE job = :job AND ended_at > :ended_at;

-- name: add_total
-- Add one ended run to the sums of its job and outcome.
INSERT INTO job_totals AS held (
    job, outcome, runs, rows, bytes, windows, late_rows, corrected_rows, new_rows, ended_at
)
VALUES (:job, :outcome, 1, :rows, :bytes, :windows, :late_rows, :corrected_rows, :new_rows, :ended_at)
ON CONFLICT (job, outcome) DO UPDATE SET
    runs = held.runs + 1,
    rows = held.rows + excluded.rows,
    bytes = held.bytes + excluded.bytes,
    windows = held.windows + excluded.windows,
    late_rows = held.late_rows + excluded.late_rows,
    corrected_rows = held.corrected_rows + excluded.corrected_rows,
    new_rows = held.new_rows + excluded.new_rows,
    ended_at = CASE WHEN held.ended_at > excluded.ended_at THEN held.ended_at ELSE excluded.ended_at END;

-- name: totals
-- All sums.
SELECT * FROM job_totals ORDER BY job, outcome;

-- name: add_ledger_total
-- Add one ended run's entry to the sums of its job.
INSERT INTO ledger_totals AS held (job, entry, reason, total)
VALUES (:job, :entry, :reason, :number)
ON CONFLICT (job, entry, reason) DO UPDATE SET total = held.total + excluded.total;

-- name: ledger_totals
-- All ledger sums.
SELECT job, entry, reason, total FROM ledger_totals ORDER BY job, entry, reason;
