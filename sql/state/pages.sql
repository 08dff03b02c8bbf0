-- Data for the pages, from what is confirmed and recorded. Timestamps in results end in _at.

-- name: add_new_rows
-- Add one ended run to its quarter of an hour.
INSERT INTO rows_by_time AS held (job, slot_at, new_rows, updated_rows, runs, failed_runs)
VALUES (:job, :slot_at, :new_rows, :updated_rows, 1, :failed_runs)
ON CONFLICT (job, slot_at) DO UPDATE SET
    new_rows = held.new_rows + excluded.new_rows,
    updated_rows = held.updated_rows + excluded.updated_rows,
    runs = held.runs + 1,
    failed_runs = held.failed_runs + excluded.failed_runs;

-- name: prune_new_rows
-- Only some weeks are kept.
DELETE FROM rows_by_time WHERE job = :job AND slot_at < :before_at;

-- name: new_rows_since
-- New and updated rows of all jobs, by quarter of an hour.
SELECT job, slot_at, new_rows, updated_rows, runs, failed_runs
FROM rows_by_time
WHERE slot_at >= :since_at AND slot_at < :until_at
ORDER BY job, slot_at;

-- name: failures_in_a_row
-- A job's failed runs since its last good one, and when the first of them began.
SELECT count(*) AS runs, min(started_at) AS since_at
FROM runs
WHERE
    job = :job AND ended_at IS NOT NULL AND (outcome = 'failed' OR (outcome = 'partial' AND failures <> '[]'))
    AND started_at > coalesce(
        (
            SELECT good.started_at
            FROM runs AS good
            WHERE
                good.job = :job AND good.ended_at IS NOT NULL
                AND (good.outcome = 'ok' OR (good.outcome = 'partial' AND good.failures = '[]'))
            ORDER BY good.started_at DESC
            LIMIT 1
        ),
        :epoch_at
    );

-- name: partial_runs
-- The latest partial runs of all jobs, in which rows may have been set aside.
SELECT * FROM runs
WHERE outcome = 'partial' AND started_at >= :since_at
ORDER BY started_at DESC
LIMIT :limit;

-- name: chosen_runs
-- One page of runs, newest first; '' means every job and outcome. `news`: only those that found something.
SELECT * FROM runs
WHERE
    started_at >= :since_at AND started_at < :until_at AND (:job = '' OR job = :job) AND (:outcome = '' OR outcome = :outcome)
    AND (:news = 0 OR outcome <> 'ok' OR new_rows > 0 OR corrected_rows > 0)
ORDER BY started_at DESC, run_id DESC
LIMIT :limit;

-- name: count_runs
-- How many runs that selection has, whatever they found.
SELECT count(*) AS runs, sum(CASE WHEN outcome <> 'ok' OR new_rows > 0 OR corrected_rows > 0 THEN 1 ELSE 0 END) AS with_news
FROM runs
WHERE started_at >= :since_at AND started_at < :until_at AND (:job = '' OR job = :job) AND (:outcome = '' OR outcome = :outcome);

-- name: run_by_id
-- One run.
SELECT * FROM runs WHERE run_id = :run_id;

-- name: runs_that_begin_with
-- Two runs whose id starts with this, which is enough to see that it is ambiguous.
SELECT * FROM runs WHERE substr(run_id, 1, length(:start)) = :start LIMIT 2;

-- name: run_before
-- The run of a job before another one.
SELECT * FROM runs WHERE job = :job AND started_at < :at ORDER BY started_at DESC, run_id DESC LIMIT 1;

-- name: run_after
-- The run of a job after another one.
SELECT * FROM runs WHERE job = :job AND started_at > :at ORDER BY started_at, run_id LIMIT 1;

-- name: run_at
-- The run of a job during which something was written.
SELECT run_id FROM runs
WHERE job = :job AND started_at <= :at AND (ended_at IS NULL OR ended_at >= :at)
ORDER BY started_at DESC
LIMIT 1;

-- name: same_error
-- How many kept runs of a job had this error.
SELECT count(*) AS runs FROM runs WHERE job = :job AND error = :error;

-- name: windows_written
-- What a run wrote and no later run has replaced, from windows at most a day old.
SELECT
    device_id, window_start AS starts_at, window_end AS ends_at, s3_key, record_count, size_bytes, status, trouble,
    updated_at
FROM export_windows
WHERE pipeline = :pipeline AND window_start >= :since_at AND updated_at >= :from_at AND updated_at <= :to_at
ORDER BY device_id, window_start
LIMIT :limit;

-- name: window_records
-- What is confirmed of some windows of a partition.
SELECT window_start AS starts_at, window_end AS ends_at, s3_key, record_count, size_bytes, status, trouble, updated_at
FROM export_windows
WHERE pipeline = :pipeline AND device_id = :partition AND window_start >= :since_at AND window_start < :until_at
ORDER BY window_start, part;

-- name: partition_totals
-- Each pipeline: its number of partitions, slowest and furthest cursor, and how many partitions failed.
SELECT
    pipeline, count(*) AS partitions, min(last_exported_at) AS slowest_at, max(last_exported_at) AS furthest_at,
    min(high_watermark_at) AS oldest_at, sum(CASE WHEN status = 'error' THEN 1 ELSE 0 END) AS failing
FROM export_checkpoints
WHERE device_id <> '' AND last_exported_at IS NOT NULL
GROUP BY pipeline;

-- name: trouble_by_partition
-- Missing or changed objects found by listings, by partition, most first; `all_...` cover every partition of the
-- pipeline, even beyond the limit. Filters by trouble to use its index.
SELECT
    pipeline, device_id, trouble, count(DISTINCT window_start) AS windows, min(window_start) AS first_at,
    max(window_end) AS last_at,
    sum(count(DISTINCT window_start)) OVER (PARTITION BY pipeline, trouble) AS all_windows,
    count(*) OVER (PARTITION BY pipeline, trouble) AS all_partitions,
    min(min(window_start)) OVER (PARTITION BY pipeline, trouble) AS all_first_at,
    max(max(window_end)) OVER (PARTITION BY pipeline, trouble) AS all_last_at
FROM export_windows
WHERE trouble <> '' AND trouble IN ('missing', 'foreign')
GROUP BY trouble, pipeline, device_id
ORDER BY windows DESC, pipeline, device_id
LIMIT :limit;

-- name: quiet_partitions
-- Partitions of pulls whose windows never had a row, or often had some and now have none.
SELECT pipeline, device_id, min(window_start) AS first_at, max(CASE WHEN record_count > 0 THEN window_end END) AS last_at
FROM export_windows
WHERE pipeline IN ('amplitude', 'appmetrica')
GROUP BY pipeline, device_id
HAVING
    max(window_end) > :quiet_at
    AND (
        (count(*) >= :never AND max(record_count) = 0)
        OR (
            sum(CASE WHEN record_count > 0 THEN 1 ELSE 0 END) >= :usual
            AND max(CASE WHEN record_count > 0 THEN window_end END) <= :quiet_at
        )
    )
ORDER BY pipeline, device_id;

-- name: trouble_windows
-- A pipeline's windows with trouble, in index order: a condition on time would make SQLite read all windows.
SELECT device_id, window_start AS starts_at, window_end AS ends_at, trouble
FROM export_windows
WHERE pipeline = :pipeline AND trouble <> ''
ORDER BY trouble, device_id, window_start
LIMIT :limit;

-- name: partition_groups
-- One page of a pipeline's partitions in groups of :size by name; a size of 1 returns each by itself.
SELECT
    min(device_id) AS first_name, max(device_id) AS last_name, count(*) AS partitions,
    min(last_exported_at) AS slowest_at, min(high_watermark_at) AS oldest_at, max(error_message) AS error
FROM (
    SELECT
        device_id, last_exported_at, high_watermark_at, error_message,
        (row_number() OVER (ORDER BY device_id) - 1) / :size AS number
    FROM export_checkpoints
    WHERE
        pipeline = :pipeline AND device_id <> '' AND last_exported_at IS NOT NULL AND device_id >= :first
        AND (:last = '' OR device_id <= :last) AND lower(device_id) LIKE :pattern ESCAPE '!'
) AS numbered
GROUP BY number
ORDER BY number
LIMIT :limit OFFSET :offset;

-- name: count_partitions
-- How many partitions of a pipeline have such a name.
SELECT count(*) AS partitions
FROM export_checkpoints
WHERE
    pipeline = :pipeline AND device_id <> '' AND last_exported_at IS NOT NULL AND device_id >= :first
    AND (:last = '' OR device_id <= :last) AND lower(device_id) LIKE :pattern ESCAPE '!';

-- name: late_partitions
-- Names of a pipeline's partitions that are not finished up to :before_at.
SELECT device_id
FROM export_checkpoints
WHERE
    pipeline = :pipeline AND device_id <> '' AND last_exported_at < :before_at AND device_id >= :first
    AND (:last = '' OR device_id <= :last) AND lower(device_id) LIKE :pattern ESCAPE '!'
ORDER BY device_id
LIMIT :limit;

-- name: any_rows
-- A row if any partition has an object in that span, or had one on a day from :since_day_at on whose records were
-- deleted.
SELECT 1 AS found FROM export_windows
WHERE pipeline = :pipeline AND window_start >= :since_at AND window_start < :until_at
UNION ALL
SELECT 1 AS found FROM export_days
WHERE pipeline = :pipeline AND day_at >= :since_day_at AND day_at < :until_at
LIMIT 1;

-- name: any_rows_between
-- The same for partitions from :first to :last, with one look-up per partition and index.
SELECT 1 AS found
FROM export_checkpoints AS c
WHERE
    c.pipeline = :pipeline AND c.device_id >= :first AND c.device_id <= :last
    AND (
        EXISTS (
            SELECT 1 FROM export_windows AS w
            WHERE
                w.pipeline = c.pipeline AND w.device_id = c.device_id
                AND w.window_start >= :since_at AND w.window_start < :until_at
        )
        OR EXISTS (
            SELECT 1 FROM export_days AS d
            WHERE
                d.pipeline = c.pipeline AND d.device_id = c.device_id
                AND d.day_at >= :since_day_at AND d.day_at < :until_at
        )
    )
LIMIT 1;

-- name: dismissed
-- Problems that a person dismissed.
SELECT problem_id, dismissed_at FROM dismissed_problems;

-- name: dismiss
-- Later occurrences count as a problem again.
INSERT INTO dismissed_problems (problem_id, dismissed_at, dismissed_by) VALUES (:problem_id, :at, :by)
ON CONFLICT (problem_id) DO UPDATE SET dismissed_at = excluded.dismissed_at, dismissed_by = excluded.dismissed_by;

-- name: forget_dismissed
-- Dismissals of problems that are over.
DELETE FROM dismissed_problems WHERE dismissed_at < :before_at;
