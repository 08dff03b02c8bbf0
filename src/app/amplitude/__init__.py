"""Amplitude: product events by the hour to objects and the warehouse, and weeks of them on request."""
