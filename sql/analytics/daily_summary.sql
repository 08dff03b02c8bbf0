-- title: Each device, day by day
-- summary: daily_summary
-- param device_id: text: this device only
-- param from: timestamp: rows at or after this instant
-- param to: timestamp: rows before this instant
-- reads: device_id = $device_id, timestamp >= $from, timestamp < $to
-- Averages and counts by device and UTC day.
SELECT
    device_id,
    CAST(timestamp AS DATE) AS date,
    avg(voltage) AS avg_voltage,
    max(temperature) AS max_temperature,
    avg(soc) AS avg_soc,
    count(*) AS row_count
FROM read_parquet({{S3_PATH}})
WHERE
    device_id IS NOT NULL AND timestamp IS NOT NULL
    AND ($device_id IS NULL OR device_id = $device_id)
    AND ($from IS NULL OR timestamp >= $from)
    AND ($to IS NULL OR timestamp < $to)
GROUP BY device_id, CAST(timestamp AS DATE)
ORDER BY device_id, date;
