"""The start commands of older tools in a checkout: `python main.py` serves, and `uvicorn main:app` does as well."""

import sys
from typing import Any


def __getattr__(name: str) -> Any:
    """`app`, the ASGI application."""
    if name != "app":
        raise AttributeError(name)
    from app import main

    return main.app


if __name__ == "__main__":
    from app.cli import main

    sys.exit(main())
