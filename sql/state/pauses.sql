-- Paused jobs. Every process follows them, and a restart changes nothing.

-- name: paused
-- All jobs that are paused.
SELECT job, paused_at, paused_by FROM paused_jobs ORDER BY job;

-- name: pause
-- The first one who pauses a job is kept.
INSERT INTO paused_jobs (job, paused_at, paused_by) VALUES (:job, :at, :by)
ON CONFLICT (job) DO NOTHING;

-- name: resume
-- The timer is followed again; nothing when the job is not paused.
DELETE FROM paused_jobs WHERE job = :job;
