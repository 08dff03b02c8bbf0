-- DuckDB's time_bucket counts from 2000-01-03.
SELECT
    device_id,
    timestamp_micros(
        unix_micros(timestamp) - pmod(unix_micros(timestamp) - 946857600000000, CAST(:minutes AS BIGINT) * 60000000)
    ) AS time,
    avg(voltage) AS avg_voltage,
    avg(power) AS avg_power,
    avg(temperature) AS avg_temperature,
    count(*) AS row_count
FROM {telemetry}
WHERE device_id IS NOT NULL AND timestamp IS NOT NULL
GROUP BY
    device_id,
    timestamp_micros(
        unix_micros(timestamp) - pmod(unix_micros(timestamp) - 946857600000000, CAST(:minutes AS BIGINT) * 60000000)
    )
ORDER BY device_id, time
