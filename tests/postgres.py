"""Fixtures of a real server from its wheel."""
