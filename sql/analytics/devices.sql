-- title: All devices
-- summary: devices
-- answer: devices
-- When each device was first and last seen, and how many rows it has.
SELECT
    device_id,
    min(timestamp) AS first_seen,
    max(timestamp) AS last_seen,
    count(*) AS total_records
FROM read_parquet({{S3_PATH}})
WHERE device_id IS NOT NULL
GROUP BY device_id
ORDER BY device_id;
