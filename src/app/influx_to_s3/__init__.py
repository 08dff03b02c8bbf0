"""InfluxDB to S3: telemetry by device and day, with late points in their own window and no duplicates."""
