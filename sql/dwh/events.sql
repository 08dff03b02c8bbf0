-- Which events the warehouse accounts for, asked when both ends of a pull are compared.

-- name: known_events (sqlite)
-- How many of the events of a JSON list of uuids are there, or were deleted on request.
SELECT
    (SELECT count(*) FROM events_part WHERE uuid IN (SELECT value FROM json_each(:uuids)))
    + (
        SELECT count(*) FROM dwh_deleted
        WHERE table_name = 'events_part' AND key IN (SELECT value FROM json_each(:uuids))
    ) AS events;

-- name: known_events (postgres)
-- How many of the events of a JSON list of uuids are there, or were deleted on request.
WITH asked AS (SELECT each FROM jsonb_array_elements_text(CAST(:uuids AS jsonb)) AS each)

SELECT
    (SELECT count(*) FROM events_part WHERE uuid IN (SELECT CAST(each AS uuid) FROM asked))
    + (SELECT count(*) FROM dwh_deleted WHERE table_name = 'events_part' AND key IN (SELECT each FROM asked)) AS events;
