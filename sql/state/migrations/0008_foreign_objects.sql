-- What /analytics knows of objects that it reads otherwise now: those that were left out, that have rows without a device or
-- an instant, or columns that were not understood. Each is read once more; what is known of all others stays.
DELETE FROM analytics_objects
WHERE
    fault <> ''
    OR object_id IN (SELECT object_id FROM analytics_parts WHERE device = 'null' OR day = -1073741824)
    OR schema_id IN (
        SELECT schema_id FROM analytics_schemas
        WHERE
            columns NOT LIKE '%"timestamp": "TIMESTAMP%'
            OR columns NOT LIKE '%"device_id": "VARCHAR"%'
            OR columns LIKE '%"STRUCT"%'
            OR columns LIKE '%"voltage": "VARCHAR"%'
            OR columns LIKE '%"current": "VARCHAR"%'
            OR columns LIKE '%"power": "VARCHAR"%'
            OR columns LIKE '%"temperature": "VARCHAR"%'
            OR columns LIKE '%"soc": "VARCHAR"%'
            OR columns LIKE '%"power_factor": "VARCHAR"%'
    );

DELETE FROM analytics_parts WHERE object_id NOT IN (SELECT object_id FROM analytics_objects);

UPDATE analytics_sweeps SET sweeps = sweeps + 1 WHERE only_row = 1;
