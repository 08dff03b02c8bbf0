"""Work on many processes: a queue in the PostgreSQL that holds the state, and the workers that it feeds."""
