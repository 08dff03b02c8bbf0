-- The live windows of all devices are read in one question. Valid in SQLite and PostgreSQL.

CREATE INDEX export_windows_by_start ON export_windows (pipeline, window_start);
