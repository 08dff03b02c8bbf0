-- Pulls: requests to export services, and the calls made per day.

-- name: add_export
-- Gives a new request the next number. An existing request keeps its own.
INSERT INTO pull_exports (export_id, service, owner, request, parts_count, status, created_at)
SELECT
    coalesce((SELECT max(export_id) FROM pull_exports), 0) + 1, :service, :owner, :request, :parts_count, 'open',
    :created_at
WHERE NOT EXISTS (
    SELECT 1 FROM pull_exports WHERE service = :service AND owner = :owner AND request = :request
)
ON CONFLICT DO NOTHING;

-- name: date_export
-- A request recorded while the clock was ahead takes the time of its repetition.
UPDATE pull_exports
SET created_at = :created_at
WHERE service = :service AND owner = :owner AND request = :request AND created_at > :created_at;

-- name: export_of
-- A request by its text.
SELECT export_id, request, parts_count, status = 'done' AS done, asked_at, created_at
FROM pull_exports
WHERE service = :service AND owner = :owner AND request = :request;

-- name: export_by_id
-- A request by its number.
SELECT export_id, request, parts_count, status = 'done' AS done, asked_at, created_at
FROM pull_exports
WHERE service = :service AND export_id = :export_id;

-- name: open_exports
-- An owner's requests whose file was not loaded yet, oldest first.
SELECT export_id, request, parts_count, status = 'done' AS done, asked_at, created_at
FROM pull_exports
WHERE service = :service AND owner = :owner AND status = 'open'
ORDER BY export_id;

-- name: save_export
-- Progress of a request.
UPDATE pull_exports
SET parts_count = :parts_count, status = :status, asked_at = :asked_at
WHERE export_id = :export_id;

-- name: forget_exports
-- Requests that were completed long ago. The one with the highest number stays, so that no number is given twice.
DELETE FROM pull_exports
WHERE
    service = :service AND owner = :owner AND status = 'done' AND created_at < :before_at
    AND export_id < (SELECT max(export_id) FROM pull_exports);

-- name: count_call
-- Counts one call today, unless the day's limit is reached.
INSERT INTO pull_calls AS held (service, day_at, calls)
VALUES (:service, :day_at, 1)
ON CONFLICT (service, day_at) DO UPDATE SET calls = held.calls + 1
WHERE held.calls < :limit_calls;

-- name: calls_of
-- Calls of a day, and of all days.
SELECT coalesce(sum(CASE WHEN day_at = :day_at THEN calls END), 0) AS calls, coalesce(sum(calls), 0) AS calls_ever
FROM pull_calls WHERE service = :service;
