-- Layouts: which window length and format hold from when on.

-- name: layouts
-- All layouts of a pipeline, oldest first.
SELECT effective_from AS effective_at, window_seconds, format, date_format
FROM layouts
WHERE pipeline = :pipeline
ORDER BY effective_from;

-- name: save_layout (postgres)
-- Add a layout. One that is in effect already stays as it is: objects were named by it. One that is to come is replaced.
INSERT INTO layouts AS held (pipeline, effective_from, window_seconds, format, date_format)
VALUES (:pipeline, :effective_at, :window_seconds, :format, :date_format)
ON CONFLICT (pipeline, effective_from) DO UPDATE SET
    window_seconds = excluded.window_seconds,
    format = excluded.format,
    date_format = excluded.date_format
WHERE held.effective_from > clock_timestamp();

-- name: save_layout (sqlite)
-- Add a layout. One that is in effect already stays as it is: objects were named by it. One that is to come is replaced.
INSERT INTO layouts AS held (pipeline, effective_from, window_seconds, format, date_format)
VALUES (:pipeline, :effective_at, :window_seconds, :format, :date_format)
ON CONFLICT (pipeline, effective_from) DO UPDATE SET
    window_seconds = excluded.window_seconds,
    format = excluded.format,
    date_format = excluded.date_format
WHERE held.effective_from > strftime('%Y-%m-%dT%H:%M:%f000Z', 'now');
