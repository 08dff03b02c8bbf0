"""The settings: every environment variable, its default and its reason, read once at the start."""

from pathlib import Path

DOTENV = Path(".env")
"""Read from the working directory beside the environment."""
