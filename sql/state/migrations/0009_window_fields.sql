-- How many values of each field of the source the object of a window holds, as JSON; '' for records of older versions.

ALTER TABLE export_windows ADD COLUMN source_fields TEXT NOT NULL DEFAULT '';
