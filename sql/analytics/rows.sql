-- title: Rows of one device
-- param device_id: text required: the device
-- param from: timestamp: rows at or after this instant
-- param to: timestamp: rows before this instant
-- reads: device_id = $device_id, timestamp >= $from, timestamp < $to
-- format: parquet
-- Every row and column of one device in a span of time, oldest first.
SELECT *
FROM read_parquet({{S3_PATH}})
WHERE
    device_id = $device_id
    AND ($from IS NULL OR timestamp >= $from)
    AND ($to IS NULL OR timestamp < $to)
ORDER BY timestamp, timestamp_nanos;
