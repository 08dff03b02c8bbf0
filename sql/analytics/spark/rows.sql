SELECT * FROM {telemetry} ORDER BY timestamp NULLS LAST, timestamp_nanos NULLS LAST
