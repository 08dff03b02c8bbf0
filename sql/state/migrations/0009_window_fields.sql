-- What the source answered for a window, beside what its object holds: the digest of its rows, and how many values of each
-- field the object holds as JSON. '' for records of older versions.

ALTER TABLE export_windows ADD COLUMN source_digest TEXT NOT NULL DEFAULT '';
ALTER TABLE export_windows ADD COLUMN source_fields TEXT NOT NULL DEFAULT '';
