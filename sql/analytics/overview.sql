-- title: Everything at a glance
-- summary: overview
-- answer: object
-- param device_id: text: this device only
-- param from: timestamp: rows at or after this instant
-- param to: timestamp: rows before this instant
-- reads: device_id = $device_id, timestamp >= $from, timestamp < $to
-- Rows and devices in all objects, with the first and last instant. Rows without a device or an instant are counted too.
SELECT
    count(*) AS total_rows,
    count(DISTINCT device_id) AS device_count,
    min(timestamp) AS min_timestamp,
    max(timestamp) AS max_timestamp
FROM read_parquet({{S3_PATH}})
WHERE
    ($device_id IS NULL OR device_id = $device_id)
    AND ($from IS NULL OR timestamp >= $from)
    AND ($to IS NULL OR timestamp < $to);
