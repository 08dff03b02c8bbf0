"""The warehouse: seven tables of product analytics behind /dwh, safe to post to twice."""
