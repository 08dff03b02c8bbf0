"""The lake day: closed days of the export as one Iceberg table that any engine reads."""
