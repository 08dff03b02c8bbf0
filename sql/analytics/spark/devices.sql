SELECT
    device_id,
    min(timestamp) AS first_seen,
    max(timestamp) AS last_seen,
    count(*) AS total_records
FROM {telemetry}
WHERE device_id IS NOT NULL
GROUP BY device_id
ORDER BY device_id
