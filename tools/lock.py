"""Pin every package exactly without a lock file: `python tools/lock.py [--upgrade | --check]`.

uv's resolution is universal (every platform, every Python that `requires-python` allows). It is written twice: packages
that are not direct dependencies become `[tool.uv] constraint-dependencies` in pyproject.toml, and the daemon's run-time
packages become requirements.txt with hashes, for the container. Invariant: neither names a host, a path or an index, so
both are valid for any package source; uv.lock does name them, and is not kept.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PINS = re.compile(r"^constraint-dependencies = \[.*?\]\n", re.MULTILINE | re.DOTALL)
EXPORT = (
    "--no-emit-project",
    "--no-dev",
    "--extra",
    "lake",
    "--extra",
    "scale",
    "--format",
    "requirements-txt",
    "--no-header",
    "--no-annotate",
)
HASH = re.compile(r" \\\n +--hash=(\S+)")
LEAKS = re.compile(r"://|^\s*-(?!-hash=sha256:)|^\s*#", re.MULTILINE)


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when the files match the resolution (after writing them, unless --check)."""
    parser = argparse.ArgumentParser(description="Pin every package exactly.")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--upgrade", action="store_true", help="take the newest of what is not a direct dependency")
    how.add_argument("--check", action="store_true", help="change nothing; fail when a file is out of date")
    chosen = parser.parse_args(arguments)

    paths = (ROOT / "pyproject.toml", ROOT / "requirements.txt")
    before = tuple(path.read_text() if path.exists() else "" for path in paths)
    loose = sorted(name for name in _direct(tomllib.loads(before[0])) if "==" not in name)
    if loose:
        return _fail(f"pyproject.toml: not pinned with '==': {', '.join(loose)}")
    after = _resolved(before[0], keep=not chosen.upgrade, strict=chosen.check)
    if leak := LEAKS.search(after[1]):
        return _fail(f"requirements.txt: would hold {leak.group()!r}, which belongs to this machine")
    if not chosen.check:
        for path, text in zip(paths, after, strict=True):
            path.write_text(text)
        return 0
    stale = [path.name for path, old, new in zip(paths, before, after, strict=True) if not _agree(old, new)]
    return _fail(f"{' and '.join(stale)}: out of date; run `make lock` and commit") if stale else 0


def _agree(written: str, resolved: str) -> bool:
    """Equal except for hashes added since: a project may publish more files of a version at any time."""
    return HASH.sub("", written) == HASH.sub("", resolved) and {*HASH.findall(written)} <= {*HASH.findall(resolved)}


def _direct(project: Mapping[str, Any]) -> Iterator[str]:
    """Every requirement in pyproject.toml, build requirements included."""
    yield from project["project"]["dependencies"]
    for extra in project["project"]["optional-dependencies"].values():
        yield from extra
    for group in project["dependency-groups"].values():
        yield from group
    yield from project["build-system"]["requires"]


def _resolved(pyproject: str, *, keep: bool, strict: bool) -> tuple[str, str]:
    """pyproject.toml and requirements.txt as uv resolves them; `keep` retains the current pins where possible."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pyproject.toml").write_text(pyproject if keep else _with_pins(pyproject, ()))
        if not _uv(folder, "lock", must_work=strict or not keep):
            sys.stdout.write("the present pins do not fit together any more: all of them are resolved anew\n")
            (folder / "pyproject.toml").write_text(_with_pins(pyproject, ()))
            _uv(folder, "lock")
        pinned = _with_pins(pyproject, _pins(tomllib.loads((folder / "uv.lock").read_text()), pyproject))
        _uv(folder, "export", "--frozen", *EXPORT, "--output-file", "requirements.txt")
        return pinned, (folder / "requirements.txt").read_text()


def _uv(folder: Path, *arguments: str, must_work: bool = True) -> bool:
    done = subprocess.run(("uv", *arguments, "--quiet", "--directory", str(folder)), check=False)
    if done.returncode and must_work:
        sys.exit(_fail(f"uv {arguments[0]} failed, see above"))
    return done.returncode == 0


def _pins(lock: Mapping[str, Any], pyproject: str) -> list[str]:
    """One requirement per package and version, with its fork's markers where a package has several versions."""
    direct = {re.split(r"[=\[ ;<>~!]", name, maxsplit=1)[0].lower() for name in _direct(tomllib.loads(pyproject))}
    packages = [each for each in lock["package"] if "version" in each and "registry" in each["source"]]
    versions = Counter(each["name"] for each in packages)
    pins = []
    for each in packages:
        if each["name"] in direct:
            continue
        pin = f"{each['name']}=={each['version']}"
        forks = each.get("resolution-markers", []) if versions[each["name"]] > 1 else []
        pins.append(f"{pin} ; {' or '.join(f'({fork})' for fork in forks)}" if forks else pin)
    return sorted(pins)


def _with_pins(pyproject: str, pins: Sequence[str]) -> str:
    listed = "".join(f'    "{pin}",\n' for pin in pins)
    replaced, found = PINS.subn(f"constraint-dependencies = [\n{listed}]\n" if pins else "", pyproject, count=1)
    if not found:
        replaced = pyproject.replace("[tool.uv]\n", f"[tool.uv]\nconstraint-dependencies = [\n{listed}]\n", 1)
    return replaced


def _fail(message: str) -> int:
    sys.stderr.write(f"{message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
