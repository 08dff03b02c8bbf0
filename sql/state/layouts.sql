-- Layouts from older versions: the window length and format from each date on.

-- name: layouts
-- All layouts of a pipeline, oldest first.
SELECT effective_from AS effective_at, window_seconds, format, date_format
FROM layouts
WHERE pipeline = :pipeline
ORDER BY effective_from;
