"""The HTTP front: application, keys and scopes, limits, errors, and the server."""
