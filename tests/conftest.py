"""Fixtures that every test may use; each plugin module starts and stops one kind of real server."""

pytest_plugins = (
    "browser",
    "daemon",
    "influx",
    "influxdb1",
    "postgres",
    "seaweed",
    "objects_served",
    "shell",
    "warehouse",
)
