"""Protocol simulators of the outside systems, shared by `python -m app demo` and the tests."""
