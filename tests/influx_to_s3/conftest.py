"""The InfluxDB fixtures, readers of both languages, the exporter and a proxy to S3, for the tests of this folder."""

from exporter import exporter
from influx import influx
from influx_readers import make, reader
from influxdb1 import influxdb1
from object_stores import proxy, shared_proxy

__all__ = ["exporter", "influx", "influxdb1", "make", "proxy", "reader", "shared_proxy"]
