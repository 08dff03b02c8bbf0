-- title: Rows by day
-- summary: rows_by_day
-- param device_id: text: this device only
-- param from: timestamp: rows at or after this instant
-- param to: timestamp: rows before this instant
-- reads: device_id = $device_id, timestamp >= $from, timestamp < $to
-- How many rows, and of how many devices, each UTC day has.
SELECT
    CAST(timestamp AS DATE) AS date,
    count(*) AS row_count,
    count(DISTINCT device_id) AS device_count
FROM read_parquet({{S3_PATH}})
WHERE
    timestamp IS NOT NULL
    AND ($device_id IS NULL OR device_id = $device_id)
    AND ($from IS NULL OR timestamp >= $from)
    AND ($to IS NULL OR timestamp < $to)
GROUP BY ALL
ORDER BY date;
