"""The InfluxDB fixtures, readers of both languages, the exporter and a proxy to S3, for the tests of this folder."""

from exporter import exporter
from influx import influx
from influxdb1 import influxdb1
from influxql_server import exporter_of_either, make, reader
from object_stores import proxy, shared_proxy

__all__ = ["exporter", "exporter_of_either", "influx", "influxdb1", "make", "proxy", "reader", "shared_proxy"]
