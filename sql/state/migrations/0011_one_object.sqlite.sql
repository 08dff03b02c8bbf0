-- What the source answered for a window, beside what its object holds: the digest of its rows; '' for records of older
-- versions.

ALTER TABLE export_windows ADD COLUMN source_digest TEXT NOT NULL DEFAULT '';

-- A process of an older version would write late rows to delta objects, which this one folds. As in 0006: owners of this
-- format begin with 'v3|', and the leases of the others end here.
DROP TRIGGER leases_of_this_format_inserted;
DROP TRIGGER leases_of_this_format_updated;

CREATE TRIGGER leases_of_this_format_inserted BEFORE INSERT ON leases WHEN NEW.owner NOT LIKE 'v3|%'
BEGIN
    SELECT RAISE(IGNORE);
END;

CREATE TRIGGER leases_of_this_format_updated BEFORE UPDATE ON leases WHEN NEW.owner NOT LIKE 'v3|%'
BEGIN
    SELECT RAISE(IGNORE);
END;

UPDATE leases
SET owner = 'v3|upgrade', generation = generation + 1, expires_at = strftime('%Y-%m-%dT%H:%M:%f000Z', 'now');
