"""Install Headwater as a user would and check the result: `python tools/check_wheel.py`.

Runs the Dockerfile's steps without a container engine: an empty environment, requirements.txt with hashes, then the
wheel without its dependencies. Fails unless the packages import, the SQL files are included, and the command line
works.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSIDE = """
from importlib.resources import files
import app, simulators.demo
sql = {path.name for folder in files("app").joinpath("sql").iterdir() for path in folder.iterdir()}
assert sql, "the wheel holds no SQL"
assert files("app").joinpath("docs", "influx_to_s3.md").is_file(), "the wheel holds no guides"
"""


def main() -> int:
    """Exit code 0 when the installed wheel works."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run("uv", "build", "--quiet", "--wheel", "--out-dir", str(folder), str(ROOT))
        (wheel,) = folder.glob("*.whl")
        python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        _run("uv", "venv", "--quiet", "--no-project", str(folder / "venv"))
        install = ("uv", "pip", "install", "--quiet", "--python", str(python))
        _run(*install, "--require-hashes", "-r", str(ROOT / "requirements.txt"))
        _run(*install, "--no-deps", str(wheel))
        _run(str(python), "-I", "-c", INSIDE, cwd=folder)
        if (ROOT / "src" / "app" / "__main__.py").exists():
            _run(str(python), "-I", "-m", "app", "--help", cwd=folder)
            # a directory and a file in the working directory with the names of packages must not shadow them
            (folder / "app").mkdir()
            (folder / "app" / "__init__.py").touch()
            (folder / "click.py").write_text("raise SystemExit('imported from the working directory')")
            _run(str(python), "-m", "app", "check", cwd=folder)
    return 0


def _run(*command: str, cwd: Path = ROOT) -> None:
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    if done.returncode:
        sys.exit(f"failed with status {done.returncode}: {' '.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
