-- The clock that the state uses, and what in the state is ahead of it.

-- name: now (postgres)
-- The clock of the database, which all processes share.
SELECT clock_timestamp() AS now_at;

-- name: now (sqlite)
-- The clock of this machine.
SELECT strftime('%Y-%m-%dT%H:%M:%f000Z', 'now') AS now_at;

-- name: ahead
-- The latest end of a run and the latest cursor of each job, if after :until_at.
SELECT job, max(ended_at) AS latest_at FROM job_totals WHERE ended_at > :until_at GROUP BY job
UNION ALL
SELECT pipeline AS job, max(last_exported_at) AS latest_at
FROM export_checkpoints
WHERE last_exported_at > :until_at
GROUP BY pipeline;
