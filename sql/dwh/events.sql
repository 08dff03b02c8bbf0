-- Which events the warehouse holds, for comparing both ends of a pull.

-- name: known_events (sqlite)
-- How many of a JSON list of uuids are stored.
SELECT count(*) AS events FROM events_part WHERE uuid IN (SELECT value FROM json_each(:uuids));

-- name: known_events (postgres)
-- How many of a JSON list of uuids are stored.
SELECT count(*) AS events FROM events_part
WHERE uuid IN (SELECT CAST(each AS uuid) FROM jsonb_array_elements_text(CAST(:uuids AS jsonb)) AS each);
