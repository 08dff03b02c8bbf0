"""CSV files dropped into a folder -> one master file: merged by key, archived or quarantined, revertible."""
