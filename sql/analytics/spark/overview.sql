SELECT
    count(*) AS total_rows,
    count(DISTINCT device_id) AS device_count,
    min(timestamp) AS min_timestamp,
    max(timestamp) AS max_timestamp
FROM {telemetry}
