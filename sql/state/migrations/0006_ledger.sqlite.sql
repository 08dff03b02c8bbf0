-- The ledger of each run and its sums, and a fence against the version before.

ALTER TABLE runs ADD COLUMN ledger TEXT NOT NULL DEFAULT '{}';

-- Sums over all runs that ended, also those whose record was pruned since, by job and entry of the ledger. What was newly
-- set aside stands by reason; the other entries have the reason ''.
CREATE TABLE ledger_totals (
    job    TEXT   NOT NULL,
    entry  TEXT   NOT NULL,
    reason TEXT   NOT NULL,
    total  BIGINT NOT NULL,
    PRIMARY KEY (job, entry, reason)
);

-- A process of the version before that still runs during a deploy must write nothing more. Owners of this format begin with
-- 'v2|'; a lease of another owner is not taken: that process finds each job held by another one. The leases that it has
-- end here with a generation that it does not know, so that its next commit and its next renewal are refused.
CREATE TRIGGER leases_of_this_format_inserted BEFORE INSERT ON leases WHEN NEW.owner NOT LIKE 'v2|%'
BEGIN
    SELECT RAISE(IGNORE);
END;

CREATE TRIGGER leases_of_this_format_updated BEFORE UPDATE ON leases WHEN NEW.owner NOT LIKE 'v2|%'
BEGIN
    SELECT RAISE(IGNORE);
END;

UPDATE leases
SET owner = 'v2|upgrade', generation = generation + 1, expires_at = strftime('%Y-%m-%dT%H:%M:%f000Z', 'now');
