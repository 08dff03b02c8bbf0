-- Layouts as older versions kept them: which window length and format hold from when on.

-- name: layouts
-- All layouts of a pipeline, oldest first.
SELECT effective_from AS effective_at, window_seconds, format, date_format
FROM layouts
WHERE pipeline = :pipeline
ORDER BY effective_from;
