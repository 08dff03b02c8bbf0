"""The start command of the CSV watchdog in a checkout: `python csv_watchdog.py [--dry-run]` runs the job csv_inbox."""

import sys

from app.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", "csv_inbox", *sys.argv[1:]]))
