SELECT * FROM {telemetry} ORDER BY timestamp, timestamp_nanos
