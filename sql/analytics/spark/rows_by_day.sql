SELECT
    CAST(timestamp AS DATE) AS date,
    count(*) AS row_count,
    count(DISTINCT device_id) AS device_count
FROM {telemetry}
WHERE timestamp IS NOT NULL
GROUP BY CAST(timestamp AS DATE)
ORDER BY date
