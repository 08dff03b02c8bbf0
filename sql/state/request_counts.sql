-- Requests that an outside system charges for.

-- name: add_requests
-- Add the requests that one process sent between two timestamps to the sums of their hour.
INSERT INTO request_counts AS held (hour_at, kind, requests, first_at, last_at)
VALUES (:hour_at, :kind, :requests, :first_at, :last_at)
ON CONFLICT (hour_at, kind) DO UPDATE SET
    requests = held.requests + excluded.requests,
    first_at = CASE WHEN held.first_at < excluded.first_at THEN held.first_at ELSE excluded.first_at END,
    last_at = CASE WHEN held.last_at > excluded.last_at THEN held.last_at ELSE excluded.last_at END;

-- name: requests_between
-- The sums of each hour, without those recorded by a clock that was ahead.
SELECT kind, requests, first_at, last_at FROM request_counts WHERE hour_at >= :since_at AND last_at <= :until_at;

-- name: forget_requests_counted
-- Remove hours that no estimate uses any more.
DELETE FROM request_counts WHERE hour_at < :before_at;
