"""The InfluxDB fixtures, readers of both languages and the exporter, for the tests of this folder."""

from exporter import exporter
from influx import influx
from influx_readers import make, reader
from influxdb1 import influxdb1

__all__ = ["exporter", "influx", "influxdb1", "make", "reader"]
