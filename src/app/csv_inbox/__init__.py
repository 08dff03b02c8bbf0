"""CSV files dropped into a folder -> one master file: merged by key, archived or quarantined, revertible.

Read top-down: `job` (a run, file by file) -> `file_steps` (what becomes of one file, as one transaction) -> `incoming`
(it is checked and spooled) and `merge` (the master is rewritten) -> `key_index` and `csv_tokenizer` (which rows match,
where fields end). `transaction` has the journal and the load history, `quarantine` the files that cannot be merged,
`discovery` the paths and the files that wait, `config` the settings and the errors.
"""
