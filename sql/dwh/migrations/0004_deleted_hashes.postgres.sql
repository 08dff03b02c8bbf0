-- Hashes stand for the natural keys of deleted rows, so that nothing of a person is left. The salt is of this database
-- alone: no list that was made elsewhere tells whose hash it is. A process of an earlier version, which would look for
-- the keys themselves, fails from here on.
CREATE TABLE dwh_deleted_salt (salt TEXT NOT NULL PRIMARY KEY);

INSERT INTO dwh_deleted_salt (salt) VALUES (gen_random_uuid()::text || gen_random_uuid()::text);

ALTER TABLE dwh_deleted RENAME COLUMN key TO key_hash;

UPDATE dwh_deleted
SET key_hash = encode(
    sha256(convert_to((SELECT salt FROM dwh_deleted_salt) || table_name || '/' || key_hash, 'UTF8')), 'hex'
);
