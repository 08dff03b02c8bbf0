-- title: The latest reading of each device
-- path: devices/latest
-- summary: device_latest
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
    WHERE device_id IS NOT NULL AND timestamp IS NOT NULL
    GROUP BY device_id
)
ORDER BY device_id;
