"""CSV files dropped into a folder -> one master file: merged by key, archived or quarantined, revertible.

Read top-down: `job` (a run, file by file, each as one transaction) -> `merge` (the master is rewritten) -> `incoming`
(the file is checked and spooled) -> `key_index` and `csv_tokenizer` (which rows match, where fields end). `transaction`
has the journal and the load history, `after_merge` rows that are appended later and undo, `quarantine` the files that
cannot be merged, `discovery` the paths and the files that wait, `config` the settings and the errors.
"""
