"""The settings: every environment variable, its default and its purpose, read once at startup."""

from pathlib import Path

DOTENV = Path(".env")
"""Read from the working directory beside the environment."""

NEW_KEY = "python -m app keys new admin --scopes admin"
"""The command that hints name: it runs as it stands, and its key opens every page."""
