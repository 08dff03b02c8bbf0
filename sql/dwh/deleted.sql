-- Rows deleted on request, by the hashes of their natural keys; app.dwh.warehouse.HASH computes the same hash.

-- name: has_deleted
-- Whether any row of a table was deleted: only then are rows checked against deleted ones.
SELECT EXISTS (SELECT 1 AS found FROM dwh_deleted WHERE table_name = :table) AS has_deleted;

-- name: deleted_keys (sqlite)
-- Which keys of a JSON list belong to deleted rows.
SELECT asked.value AS key FROM json_each(:keys) AS asked
WHERE EXISTS (
    SELECT 1 FROM dwh_deleted
    WHERE
        table_name = :table
        AND key_hash = sha256_hex((SELECT salt FROM dwh_deleted_salt) || :table || '/' || asked.value)
);

-- name: deleted_keys (postgres)
-- Which keys of a JSON list belong to deleted rows.
SELECT asked.each AS key FROM jsonb_array_elements_text(CAST(:keys AS jsonb)) AS asked (each)
WHERE EXISTS (
    SELECT 1 FROM dwh_deleted
    WHERE
        table_name = :table
        AND key_hash = encode(
            sha256(
                convert_to((SELECT salt FROM dwh_deleted_salt) || CAST(:table AS text) || '/' || asked.each, 'UTF8')
            ),
            'hex'
        )
);
