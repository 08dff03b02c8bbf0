-- Open alerts. Each change is one statement, so only one of several processes sends the alert.

-- name: open_alerts
-- All open alerts.
SELECT job, event, told_at FROM open_alerts ORDER BY job, event;

-- name: begin_alert
-- Returns a row only to the first caller.
INSERT INTO open_alerts (job, event, told_at) VALUES (:job, :event, :at)
ON CONFLICT (job, event) DO NOTHING
RETURNING job;

-- name: end_alerts
-- Alerts about a job's runs from before :before are over; returns rows only to the caller that ends them. Clocks and
-- objects are no runs.
DELETE FROM open_alerts
WHERE job = :job AND event NOT IN ('clock_ahead', 'objects_missing') AND told_at < :before
RETURNING job;

-- name: end_alert
-- The same for one event.
DELETE FROM open_alerts WHERE job = :job AND event = :event AND told_at < :before
RETURNING job;
