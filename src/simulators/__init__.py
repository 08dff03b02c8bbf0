"""Protocol simulators of external systems, shared by `python -m app demo` and the tests."""
