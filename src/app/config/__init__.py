"""The settings: every environment variable, its default and its purpose, read once at startup."""

from pathlib import Path

DOTENV = Path(".env")
"""Read from the working directory, in addition to the environment."""

NEW_KEY = "python -m app keys new admin --scopes admin"
"""The command named in hints: it runs as written, and its key opens every page."""
