-- Window records and days in a shorter form, which the version before cannot read: "=" in `source_fields` and
-- `source_digest`, lists of four numbers in `source_sums`, a list in `windows`; see `app.db.checkpoints`. What older versions
-- stored stays as it is.

-- As in 0006, so that a process of an older version writes nothing more: owners of this format begin with 'v4|', and the
-- leases of the others end here.
DROP TRIGGER leases_of_this_format_inserted;
DROP TRIGGER leases_of_this_format_updated;

CREATE TRIGGER leases_of_this_format_inserted BEFORE INSERT ON leases WHEN NEW.owner NOT LIKE 'v4|%'
BEGIN
    SELECT RAISE(IGNORE);
END;

CREATE TRIGGER leases_of_this_format_updated BEFORE UPDATE ON leases WHEN NEW.owner NOT LIKE 'v4|%'
BEGIN
    SELECT RAISE(IGNORE);
END;

UPDATE leases
SET owner = 'v4|upgrade', generation = generation + 1, expires_at = strftime('%Y-%m-%dT%H:%M:%f000Z', 'now');
