"""The HTTP layer: application, keys and scopes, limits, errors, and the server."""
