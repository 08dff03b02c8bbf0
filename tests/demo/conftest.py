"""The InfluxDB fixtures, for the tests of this folder."""

from influx import influx
from influxdb1 import influxdb1

__all__ = ["influx", "influxdb1"]
