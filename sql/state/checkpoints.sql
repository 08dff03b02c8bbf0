-- Checkpoints: what is confirmed, per pipeline and partition (device_id). Timestamps in results end in _at.

-- name: cursors
-- Partition and cursor, of one partition or of all; a partition that only ever failed has none. A cursor after :until_at was set by a clock that was
-- ahead. It is replaced by the newest window recorded by a correct clock, else by the newest day whose records were
-- deleted, else by the first cursor.
SELECT device_id, cursor_at
FROM (
    SELECT
        held.device_id,
        CASE
            WHEN held.last_exported_at <= :until_at THEN held.last_exported_at
            ELSE coalesce(
                (
                    SELECT max(w.window_start)
                    FROM export_windows AS w
                    WHERE
                        w.pipeline = held.pipeline AND w.device_id = held.device_id
                        AND w.window_start <= :until_at AND w.updated_at <= :until_at
                ),
                (
                    SELECT max(d.day_at)
                    FROM export_days AS d
                    WHERE d.pipeline = held.pipeline AND d.device_id = held.device_id AND d.day_at <= :until_at
                ),
                held.started_at
            )
        END AS cursor_at
    FROM export_checkpoints AS held
    WHERE
        held.pipeline = :pipeline AND held.last_exported_at IS NOT NULL
        AND (CAST(:partition AS TEXT) IS NULL OR held.device_id = :partition)
) AS known
WHERE cursor_at <= :until_at;

-- name: starts
-- Partition and first cursor, unless a clock that was ahead set it.
SELECT device_id, started_at
FROM export_checkpoints
WHERE pipeline = :pipeline AND started_at <= :until_at;

-- name: records
-- The records of windows that start in [since_at, until_at), by window start, then part.
SELECT
    window_start AS starts_at, window_end AS ends_at, part, s3_key, version, digest, record_count, size_bytes,
    source_cells, min_at, max_at, status, source_fields, source_digest, source_sums, trouble, folded, updated_at
FROM export_windows
WHERE
    pipeline = :pipeline AND device_id = :partition
    AND window_start >= :since_at AND window_start < :until_at
ORDER BY window_start, part;

-- name: live_records (postgres)
-- The records of windows that start at since_at or later, of the partitions in a JSON list, or of all.
SELECT
    device_id, window_start AS starts_at, window_end AS ends_at, part, s3_key, version, digest, record_count, size_bytes,
    source_cells, min_at, max_at, status, source_fields, source_digest, source_sums, trouble, folded, updated_at
FROM export_windows
WHERE
    pipeline = :pipeline AND window_start >= :since_at
    AND (CAST(:partitions AS JSONB) IS NULL OR device_id IN (SELECT jsonb_array_elements_text(CAST(:partitions AS JSONB))))
ORDER BY device_id, window_start, part;

-- name: live_records (sqlite)
-- The same.
SELECT
    device_id, window_start AS starts_at, window_end AS ends_at, part, s3_key, version, digest, record_count, size_bytes,
    source_cells, min_at, max_at, status, source_fields, source_digest, source_sums, trouble, folded, updated_at
FROM export_windows
WHERE
    pipeline = :pipeline AND window_start >= :since_at
    AND (:partitions IS NULL OR device_id IN (SELECT value FROM json_each(:partitions)))
ORDER BY device_id, window_start, part;

-- name: save_record
-- Insert or replace the record of one object. Clears earlier trouble.
INSERT INTO export_windows (
    pipeline, device_id, window_start, part, window_end, s3_key, version, digest, record_count, size_bytes,
    source_cells, min_at, max_at, status, source_fields, source_digest, source_sums, folded, updated_at
) VALUES (
    :pipeline, :partition, :starts_at, :part, :ends_at, :key, :version, :digest, :rows, :size_bytes,
    :source_cells, :min_at, :max_at, :status, :fields, :source_digest, :sums, :folded, :now_at
)
ON CONFLICT (pipeline, device_id, window_start, part) DO UPDATE SET
    window_end = excluded.window_end,
    s3_key = excluded.s3_key,
    version = excluded.version,
    digest = excluded.digest,
    record_count = excluded.record_count,
    size_bytes = excluded.size_bytes,
    source_cells = excluded.source_cells,
    min_at = excluded.min_at,
    max_at = excluded.max_at,
    status = excluded.status,
    source_fields = excluded.source_fields,
    source_digest = excluded.source_digest,
    source_sums = excluded.source_sums,
    trouble = '',
    folded = excluded.folded,
    updated_at = excluded.updated_at;

-- name: mark
-- What a listing showed instead of an object, unless its record names another version by now.
UPDATE export_windows SET trouble = :trouble
WHERE
    pipeline = :pipeline AND device_id = :partition AND window_start = :starts_at AND part = :part
    AND version = :version;

-- name: troubles
-- How many objects are missing from listings, or belong to another program.
SELECT pipeline, trouble, count(*) AS objects
FROM export_windows
WHERE trouble <> ''
GROUP BY pipeline, trouble;

-- name: note_undeleted
-- An object that could not be deleted, and why.
INSERT INTO undeleted_objects (pipeline, s3_key, error) VALUES (:pipeline, :key, :error)
ON CONFLICT (pipeline, s3_key) DO UPDATE SET error = excluded.error;

-- name: forget_undeleted
-- The object has been deleted.
DELETE FROM undeleted_objects WHERE pipeline = :pipeline AND s3_key = :key;

-- name: undeleted
-- Objects that could not be deleted.
SELECT s3_key, error FROM undeleted_objects WHERE pipeline = :pipeline ORDER BY s3_key;

-- name: forget_deltas
-- The window's object now contains the rows of its deltas.
DELETE FROM export_windows
WHERE pipeline = :pipeline AND device_id = :partition AND window_start = :starts_at AND part > 0;

-- name: retire_records
-- Deletes records of closed windows that start before :before_at and end by :until_at; returns their starts and rows.
-- Keeps records with trouble from a listing, and those of windows that still have deltas.
DELETE FROM export_windows
WHERE
    pipeline = :pipeline AND device_id = :partition AND window_start < :before_at AND window_end <= :until_at
    AND part = 0 AND status = 'closed' AND trouble = ''
    AND NOT EXISTS (
        SELECT 1 FROM export_windows AS delta
        WHERE
            delta.pipeline = :pipeline AND delta.device_id = :partition
            AND delta.window_start = export_windows.window_start AND delta.part > 0
    )
RETURNING window_start AS starts_at, record_count;

-- name: save_day
-- Insert or replace the summary of a day whose records were deleted.
INSERT INTO export_days (pipeline, device_id, day_at, windows) VALUES (:pipeline, :partition, :day_at, :windows)
ON CONFLICT (pipeline, device_id, day_at) DO UPDATE SET windows = excluded.windows;

-- name: days
-- Days of a partition whose records were deleted.
SELECT day_at, windows FROM export_days
WHERE pipeline = :pipeline AND device_id = :partition AND day_at >= :since_at AND day_at < :until_at;

-- name: save_checkpoint
-- The partition succeeded. Cursor and high watermark only move forward: repeating an older commit must not undo a newer
-- one. Those after :until_at were set by clocks that were ahead, and are replaced.
INSERT INTO export_checkpoints AS held (
    pipeline, device_id, started_at, last_exported_at, high_watermark_at, status, s3_key, record_count, error_message,
    created_at, updated_at
) VALUES (
    :pipeline, :partition, :cursor_at, :cursor_at, :high_watermark_at, 'ok', :key, :rows, NULL, :now_at, :now_at
)
ON CONFLICT (pipeline, device_id) DO UPDATE SET
    started_at = CASE
        WHEN held.started_at <= :until_at THEN held.started_at
        ELSE coalesce(excluded.started_at, held.started_at)
    END,
    last_exported_at = CASE
        WHEN held.last_exported_at > excluded.last_exported_at AND held.last_exported_at <= :until_at
            THEN held.last_exported_at
        ELSE coalesce(excluded.last_exported_at, held.last_exported_at)
    END,
    high_watermark_at = CASE
        WHEN held.high_watermark_at > excluded.high_watermark_at AND held.high_watermark_at <= :until_at
            THEN held.high_watermark_at
        ELSE coalesce(excluded.high_watermark_at, held.high_watermark_at)
    END,
    status = 'ok',
    s3_key = coalesce(excluded.s3_key, held.s3_key),
    record_count = coalesce(excluded.record_count, held.record_count),
    error_message = NULL,
    updated_at = excluded.updated_at;

-- name: save_failure
-- The partition failed. Its cursor stays; without one it gets none.
INSERT INTO export_checkpoints (pipeline, device_id, status, error_message, created_at, updated_at)
VALUES (:pipeline, :partition, 'error', :message, :now_at, :now_at)
ON CONFLICT (pipeline, device_id) DO UPDATE SET
    status = 'error',
    error_message = excluded.error_message,
    updated_at = excluded.updated_at;

-- name: checkpoints_of
-- How far each partition of a pipeline is, for the dashboard and the lag metric; without the pipeline's own row.
SELECT
    device_id AS partition, last_exported_at AS cursor_at, high_watermark_at, coalesce(error_message, '') AS error,
    coalesce(s3_key, '') AS key, coalesce(record_count, 0) AS rows, updated_at
FROM export_checkpoints
WHERE pipeline = :pipeline AND device_id <> ''
ORDER BY device_id;
