-- Workers of a queue, and the reports of their steps.

-- name: see_worker
-- A worker is alive.
INSERT INTO workers AS held (owner, started_at, seen_at) VALUES (:owner, :now_at, :now_at)
ON CONFLICT (owner) DO UPDATE SET seen_at = excluded.seen_at;

-- name: forget_workers
-- A worker that ended, and those not seen for long.
DELETE FROM workers WHERE owner = :owner OR seen_at < :before_at;

-- name: workers_alive
-- Workers seen recently.
SELECT count(*) AS workers FROM workers WHERE seen_at >= :since_at;

-- name: parts_held
-- How many parts of a pipeline's work are held now.
SELECT count(*) AS parts FROM leases
WHERE substr(name, 1, length(:prefix)) = :prefix AND owner <> :free AND expires_at > :now_at;

-- name: save_step_report
-- The outcome of a step. Idempotent.
INSERT INTO step_reports AS held (pipeline, plan_id, step, report, ended_at)
VALUES (:pipeline, :plan_id, :step, :report, :now_at)
ON CONFLICT (pipeline, plan_id, step) DO UPDATE SET report = excluded.report, ended_at = excluded.ended_at;

-- name: take_step_reports
-- All reports; each goes to one caller only.
DELETE FROM step_reports WHERE pipeline = :pipeline
RETURNING plan_id, step, report;
