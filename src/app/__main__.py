"""`python -m app`; the commands stand in `app.cli`."""

import sys
from pathlib import Path

# `-m` puts the working directory first, which is often DATA_DIR: a file called click.py there would be imported.
# A folder called app there is met by headwater.pth, which imports this package when the interpreter starts.
if not getattr(sys.flags, "safe_path", False) and Path(sys.path[0]) == Path.cwd() != Path(__file__).parents[1]:
    del sys.path[0]

from app.cli import main

if __name__ == "__main__":
    sys.exit(main())
