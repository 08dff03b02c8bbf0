"""Fixtures of this folder."""

from exporter import exporter

__all__ = ("exporter",)
