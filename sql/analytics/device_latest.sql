-- title: The latest reading of each device
-- path: devices/latest
-- summary: device_latest
-- param device_id: text: this device only
-- param from: timestamp: rows at or after this instant
-- param to: timestamp: rows before this instant
-- reads: device_id = $device_id, timestamp >= $from, timestamp < $to
-- The latest reading of each device, by timestamp and timestamp_nanos; ties broken by the remaining columns.
SELECT device_id, unnest(latest.reading)
FROM (
    SELECT
        device_id,
        max({
            'at': timestamp,
            'nanos': coalesce(timestamp_nanos, 0),
            'reading': {
                'timestamp': timestamp,
                'voltage': voltage,
                'current': "current",
                'power': power,
                'temperature': temperature,
                'soc': soc,
                'power_factor': power_factor,
                'device_type': device_type,
                'location': location
            }
        }) AS latest
    FROM read_parquet({{S3_PATH}})
    WHERE
        device_id IS NOT NULL AND timestamp IS NOT NULL
        AND ($device_id IS NULL OR device_id = $device_id)
        AND ($from IS NULL OR timestamp >= $from)
        AND ($to IS NULL OR timestamp < $to)
    GROUP BY device_id
)
ORDER BY device_id;
