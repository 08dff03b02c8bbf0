-- Summaries: aggregates of every version of every object below the prefix, for /analytics.

-- name: facts (postgres)
-- Facts about these versions; :ids is a JSON array of texts.
SELECT o.object_id, o.object_key, o.size_bytes, o.row_count, o.fault, s.columns
FROM analytics_objects AS o
LEFT JOIN analytics_schemas AS s ON s.schema_id = o.schema_id
WHERE o.object_id IN (SELECT json_array_elements_text(CAST(:ids AS json)));

-- name: facts (sqlite)
-- Facts about these versions; :ids is a JSON array of texts.
SELECT o.object_id, o.object_key, o.size_bytes, o.row_count, o.fault, s.columns
FROM analytics_objects AS o
LEFT JOIN analytics_schemas AS s ON s.schema_id = o.schema_id
WHERE o.object_id IN (SELECT value FROM json_each(:ids));

-- name: all_facts
-- Facts about all versions that are not packed.
SELECT o.object_id, o.object_key, o.size_bytes, o.row_count, o.fault, s.columns
FROM analytics_objects AS o
LEFT JOIN analytics_schemas AS s ON s.schema_id = o.schema_id;

-- name: pairs_of_objects (postgres)
-- Device and day of each part of these versions.
SELECT DISTINCT device, day FROM analytics_parts
WHERE object_id IN (SELECT json_array_elements_text(CAST(:ids AS json)));

-- name: pairs_of_objects (sqlite)
-- Device and day of each part of these versions.
SELECT DISTINCT device, day FROM analytics_parts WHERE object_id IN (SELECT value FROM json_each(:ids));

-- name: all_pairs
-- Device and day of each part of all versions.
SELECT DISTINCT device, day FROM analytics_parts;

-- name: parts_of_pairs (postgres)
-- Every part of these days of these devices, whatever version it belongs to; :pairs is a JSON array of [device, day].
SELECT
    p.object_id, p.device, p.day, p.row_count, p.min_us, p.max_us, p.voltage_sum, p.voltage_count,
    p.temperature_max, p.soc_sum, p.soc_count, p.latest
FROM json_array_elements(CAST(:pairs AS json)) AS pair
INNER JOIN analytics_parts AS p ON p.device = pair ->> 0 AND p.day = CAST(pair ->> 1 AS integer);

-- name: parts_of_pairs (sqlite)
-- Every part of these days of these devices, whatever version it belongs to; :pairs is a JSON array of [device, day].
SELECT
    p.object_id, p.device, p.day, p.row_count, p.min_us, p.max_us, p.voltage_sum, p.voltage_count,
    p.temperature_max, p.soc_sum, p.soc_count, p.latest
FROM json_each(:pairs) AS pair
INNER JOIN analytics_parts AS p
    ON p.device = json_extract(pair.value, '$[0]') AND p.day = json_extract(pair.value, '$[1]');

-- name: all_packs
-- All packs.
SELECT device, day, etags, packed FROM analytics_days;

-- name: packs_of_pairs (postgres)
-- Packs for these days of these devices; :pairs is a JSON array of [device, day].
SELECT d.device, d.day, d.etags, d.packed
FROM json_array_elements(CAST(:pairs AS json)) AS pair
INNER JOIN analytics_days AS d ON d.device = pair ->> 0 AND d.day = CAST(pair ->> 1 AS integer);

-- name: packs_of_pairs (sqlite)
-- Packs for these days of these devices; :pairs is a JSON array of [device, day].
SELECT d.device, d.day, d.etags, d.packed
FROM json_each(:pairs) AS pair
INNER JOIN analytics_days AS d
    ON d.device = json_extract(pair.value, '$[0]') AND d.day = json_extract(pair.value, '$[1]');

-- name: packs_of_span
-- Packs for this device (any if null) in this span of days (open if null).
SELECT device, day, etags, packed
FROM analytics_days
WHERE
    (CAST(:device AS TEXT) IS NULL OR device = :device)
    AND (CAST(:first_day AS INTEGER) IS NULL OR day >= :first_day)
    AND (CAST(:last_day AS INTEGER) IS NULL OR day <= :last_day);

-- name: packable
-- Versions without a fault whose single part is of a day before :before_day, with that part; limited, by device and day.
SELECT
    p.object_id, p.device, p.day, p.row_count, p.min_us, p.max_us, p.voltage_sum, p.voltage_count,
    p.temperature_max, p.soc_sum, p.soc_count, p.latest, o.object_key, o.etag, o.size_bytes, o.schema_id
FROM analytics_parts AS p
INNER JOIN analytics_objects AS o ON o.object_id = p.object_id AND o.fault = ''
WHERE
    p.day > :no_day AND p.day < :before_day
    AND NOT EXISTS (SELECT 1 FROM analytics_parts AS other WHERE other.object_id = p.object_id AND other.place <> p.place)
ORDER BY p.device, p.day
LIMIT :at_once;

-- name: save_pack
-- Insert or replace the pack of one day of one device.
INSERT INTO analytics_days (device, day, etags, packed) VALUES (:device, :day, :etags, :packed)
ON CONFLICT (device, day) DO UPDATE SET etags = excluded.etags, packed = excluded.packed;

-- name: forget_pack
-- Remove the pack of one day of one device.
DELETE FROM analytics_days WHERE device = :device AND day = :day;

-- name: keys
-- Readable versions with rows of this device (any if null) in this span of days (open if null).
SELECT DISTINCT o.object_id, o.object_key, o.etag, o.size_bytes, o.schema_id
FROM analytics_objects AS o
INNER JOIN analytics_parts AS p ON p.object_id = o.object_id
WHERE
    (CAST(:device AS TEXT) IS NULL OR p.device = :device)
    AND (CAST(:first_day AS INTEGER) IS NULL OR p.day >= :first_day)
    AND (CAST(:last_day AS INTEGER) IS NULL OR p.day <= :last_day)
ORDER BY o.object_key;

-- name: schemas
-- Columns and types of all objects, each set once.
SELECT schema_id, columns FROM analytics_schemas;

-- name: save_object
-- Facts of a version never change, so a second writer changes nothing.
INSERT INTO analytics_objects (object_id, object_key, etag, size_bytes, row_count, schema_id, fault)
VALUES (:object_id, :key, :etag, :size_bytes, :rows, :schema_id, :fault)
ON CONFLICT (object_id) DO NOTHING;

-- name: save_schema
-- Columns that several objects share are stored once.
INSERT INTO analytics_schemas (schema_id, columns) VALUES (:schema_id, :columns)
ON CONFLICT (schema_id) DO NOTHING;

-- name: save_part
-- Parts of a version never change either.
INSERT INTO analytics_parts (
    object_id, place, device, day, row_count, min_us, max_us, voltage_sum, voltage_count, temperature_max, soc_sum,
    soc_count, latest
) VALUES (
    :object_id, :place, :device, :day, :rows, :min_us, :max_us, :voltage_sum, :voltage_count, :temperature_max, :soc_sum,
    :soc_count, :latest
)
ON CONFLICT (object_id, place) DO NOTHING;

-- name: forget_parts (postgres)
-- Remove the parts of these versions; :ids is a JSON array of texts.
DELETE FROM analytics_parts WHERE object_id IN (SELECT json_array_elements_text(CAST(:ids AS json)));

-- name: forget_parts (sqlite)
-- Remove the parts of these versions; :ids is a JSON array of texts.
DELETE FROM analytics_parts WHERE object_id IN (SELECT value FROM json_each(:ids));

-- name: forget_objects (postgres)
-- Remove these versions; :ids is a JSON array of texts.
DELETE FROM analytics_objects WHERE object_id IN (SELECT json_array_elements_text(CAST(:ids AS json)));

-- name: forget_objects (sqlite)
-- Remove these versions; :ids is a JSON array of texts.
DELETE FROM analytics_objects WHERE object_id IN (SELECT value FROM json_each(:ids));

-- name: object_ids
-- Every known version that is not packed.
SELECT object_id FROM analytics_objects;

-- name: is_asked
-- Whether a report was ever requested.
SELECT EXISTS (SELECT 1 FROM analytics_asked) AS asked;

-- name: note_asked
-- A report was requested.
INSERT INTO analytics_asked (only_row) VALUES (1) ON CONFLICT (only_row) DO NOTHING;

-- name: forget_old_objects
-- Remove versions with rows of a day before :day.
DELETE FROM analytics_objects WHERE object_id IN (SELECT object_id FROM analytics_parts WHERE day < :day);

-- name: forget_old_parts
-- Remove parts of days before :day.
DELETE FROM analytics_parts WHERE day < :day;

-- name: sweeps
-- How often versions have been removed.
SELECT coalesce(max(sweeps), 0) AS sweeps FROM analytics_sweeps;

-- name: count_sweep
-- Tell other processes that versions are being removed (:removed is 1, or 0 when they are packed), one process at a time.
INSERT INTO analytics_sweeps (only_row, sweeps) VALUES (1, :removed)
ON CONFLICT (only_row) DO UPDATE SET sweeps = analytics_sweeps.sweeps + excluded.sweeps;
