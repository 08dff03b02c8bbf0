SELECT
    device_id,
    CAST(timestamp AS DATE) AS date,
    avg(voltage) AS avg_voltage,
    max(temperature) AS max_temperature,
    avg(soc) AS avg_soc,
    count(*) AS row_count
FROM {telemetry}
WHERE device_id IS NOT NULL AND timestamp IS NOT NULL
GROUP BY device_id, CAST(timestamp AS DATE)
ORDER BY device_id, date
