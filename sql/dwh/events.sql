-- Which events the warehouse holds, asked when both ends of a pull are compared.

-- name: known_events (sqlite)
-- How many of the events of a JSON list of uuids are there.
SELECT count(*) AS events FROM events_part WHERE uuid IN (SELECT value FROM json_each(:uuids));

-- name: known_events (postgres)
-- How many of the events of a JSON list of uuids are there.
SELECT count(*) AS events FROM events_part
WHERE uuid IN (SELECT CAST(each AS uuid) FROM jsonb_array_elements_text(CAST(:uuids AS jsonb)) AS each);
