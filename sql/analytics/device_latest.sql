-- title: The latest reading of each device
-- path: devices/latest
-- summary: device_latest
-- The row with the newest instant; where several share it, the greatest by its values from left to right.
SELECT device_id, unnest(newest)
FROM (
    SELECT
        device_id,
        max({
            'timestamp': timestamp,
            'voltage': voltage,
            'current': "current",
            'power': power,
            'temperature': temperature,
            'soc': soc,
            'power_factor': power_factor,
            'device_type': device_type,
            'location': location
        }) AS newest
    FROM read_parquet({{S3_PATH}})
    WHERE device_id IS NOT NULL AND timestamp IS NOT NULL
    GROUP BY device_id
)
ORDER BY device_id;
