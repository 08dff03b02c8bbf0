"""Amplitude: hourly product events to objects and the warehouse, and weeks of them on request."""
