"""Work in many processes: a queue in the PostgreSQL database that holds the state, and the workers it feeds."""
