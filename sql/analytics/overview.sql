-- title: Everything at a glance
-- summary: overview
-- answer: object
-- Rows and devices in all objects, with the first and last instant. Rows without a device or an instant are counted too.
SELECT
    count(*) AS total_rows,
    count(DISTINCT device_id) AS device_count,
    min(timestamp) AS min_timestamp,
    max(timestamp) AS max_timestamp
FROM read_parquet({{S3_PATH}});
