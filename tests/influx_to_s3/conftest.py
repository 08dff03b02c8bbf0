"""The InfluxDB fixtures and the exporter, for the tests of this folder."""

from exporter import exporter
from influx import influx
from influxdb1 import influxdb1

__all__ = ["exporter", "influx", "influxdb1"]
