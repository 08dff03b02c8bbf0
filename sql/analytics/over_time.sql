-- title: Each device over time
-- param device_id: text: this device only
-- param from: timestamp: rows at or after this instant
-- param to: timestamp: rows before this instant
-- param minutes: integer 1..527040 = 60: minutes in one point
-- reads: device_id = $device_id, timestamp >= $from, timestamp < $to
-- Averages by device in buckets of `minutes`, for charts.
SELECT
    device_id,
    time_bucket(to_minutes($minutes), timestamp) AS "time",
    avg(voltage) AS avg_voltage,
    avg(power) AS avg_power,
    avg(temperature) AS avg_temperature,
    count(*) AS row_count
FROM read_parquet({{S3_PATH}})
WHERE
    device_id IS NOT NULL AND timestamp IS NOT NULL
    AND ($device_id IS NULL OR device_id = $device_id)
    AND ($from IS NULL OR timestamp >= $from)
    AND ($to IS NULL OR timestamp < $to)
GROUP BY ALL
ORDER BY device_id, "time";
