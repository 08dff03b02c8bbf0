"""The rules every pipeline obeys, in plain Python: imports nothing but the standard library."""
