"""Fixtures that every test may use; each plugin module starts and stops one kind of real server.

Compiled modules are kept also where Python was told not to: the tests start hundreds of processes, and each of them
would compile the program and its libraries anew.
"""

import os
import sys

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

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
