-- Equal timestamps: the greatest row by the columns from left to right, null above all, as DuckDB orders structs.
SELECT device_id, timestamp, voltage, current, power, temperature, soc, power_factor, device_type, location
FROM (
    SELECT
        *,
        row_number() OVER (
            PARTITION BY device_id
            ORDER BY
                timestamp DESC,
                coalesce(timestamp_nanos, 0) DESC,
                voltage DESC NULLS FIRST,
                current DESC NULLS FIRST,
                power DESC NULLS FIRST,
                temperature DESC NULLS FIRST,
                soc DESC NULLS FIRST,
                power_factor DESC NULLS FIRST,
                device_type DESC NULLS FIRST,
                location DESC NULLS FIRST
        ) AS place
    FROM {telemetry}
    WHERE device_id IS NOT NULL AND timestamp IS NOT NULL
) AS placed
WHERE place = 1
ORDER BY device_id
