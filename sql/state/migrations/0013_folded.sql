-- The highest delta of an older version whose rows the object of the window holds. A pass that does not ask the
-- destination must know it, or the object that it writes would no longer say so.
ALTER TABLE export_windows ADD COLUMN folded INTEGER NOT NULL DEFAULT 0;
