"""Headwater: one daemon that delivers telemetry to where people use it, and never loses or doubles a row."""
