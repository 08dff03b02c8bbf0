-- Natural keys of rows that were deleted on request.

-- name: has_deleted
-- Whether any row of a table was deleted: only then are rows compared with the deleted ones.
SELECT EXISTS (SELECT 1 AS found FROM dwh_deleted WHERE table_name = :table) AS has_deleted;

-- name: deleted_keys (sqlite)
-- Which of a JSON list of keys belong to deleted rows.
SELECT key FROM dwh_deleted WHERE table_name = :table AND key IN (SELECT value FROM json_each(:keys));

-- name: deleted_keys (postgres)
-- Which of a JSON list of keys belong to deleted rows.
SELECT key FROM dwh_deleted
WHERE table_name = :table AND key IN (SELECT each FROM jsonb_array_elements_text(CAST(:keys AS jsonb)) AS each);
