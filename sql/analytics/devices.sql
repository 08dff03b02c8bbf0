-- title: All devices
-- summary: devices
-- answer: devices
-- param device_id: text: this device only
-- param from: timestamp: rows at or after this instant
-- param to: timestamp: rows before this instant
-- reads: device_id = $device_id, timestamp >= $from, timestamp < $to
-- When each device was first and last seen, and how many rows it has.
SELECT
    device_id,
    min(timestamp) AS first_seen,
    max(timestamp) AS last_seen,
    count(*) AS total_records
FROM read_parquet({{S3_PATH}})
WHERE
    device_id IS NOT NULL
    AND ($device_id IS NULL OR device_id = $device_id)
    AND ($from IS NULL OR timestamp >= $from)
    AND ($to IS NULL OR timestamp < $to)
GROUP BY device_id
ORDER BY device_id;
