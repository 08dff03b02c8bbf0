-- Alerts that are open. Each change is one statement, so of several processes one tells.

-- name: open_alerts
-- All of them.
SELECT job, event, told_at FROM open_alerts ORDER BY job, event;

-- name: begin_alert
-- A row only for the one who is first.
INSERT INTO open_alerts (job, event, told_at) VALUES (:job, :event, :at)
ON CONFLICT (job, event) DO NOTHING
RETURNING job;

-- name: end_alerts
-- What was told of a job's runs before an instant is over; rows only for the one who ends it. Clocks and objects are no
-- runs.
DELETE FROM open_alerts
WHERE job = :job AND event NOT IN ('clock_ahead', 'objects_missing') AND told_at < :before
RETURNING job;

-- name: end_alert
-- The same for one event.
DELETE FROM open_alerts WHERE job = :job AND event = :event AND told_at < :before
RETURNING job;
