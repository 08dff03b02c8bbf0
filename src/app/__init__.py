"""Headwater: one daemon that lands telemetry where people work with it, and never loses or doubles a row."""
