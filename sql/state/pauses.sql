-- Paused jobs. Every process follows them; they survive restarts.

-- name: paused
-- All paused jobs.
SELECT job, paused_at, paused_by FROM paused_jobs ORDER BY job;

-- name: pause
-- Keeps the first pause of a job.
INSERT INTO paused_jobs (job, paused_at, paused_by) VALUES (:job, :at, :by)
ON CONFLICT (job) DO NOTHING;

-- name: resume
-- Resumes scheduled runs; does nothing if the job is not paused.
DELETE FROM paused_jobs WHERE job = :job;
