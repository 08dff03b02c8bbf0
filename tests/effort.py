"""How long the searching tests search: CI takes 1, `EFFORT=10 uv run pytest -m slow tests/...` ten times as long."""

import os

EFFORT = int(os.environ.get("EFFORT", "1"))
