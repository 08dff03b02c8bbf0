"""What the documents name exists: files, headings, commands, targets and variables."""

import re
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from app.cli import parsed
from needs import absent

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")) if "documents" not in path.parts)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:python|headwater:\S+|headwater) -m app ([a-z-]+)")
PAGE = re.compile(r"\b(?:docs/[\w/-]+|README|CONTRIBUTING|SECURITY|CHANGELOG)\.md\b")
IMPORTED_AS = {
    "APScheduler": "apscheduler",
    "google-api-python-client": "googleapiclient",
    "google-auth": "google.auth",
    "psycopg[binary]": "psycopg",
}
TARGET = re.compile(r"`make ([a-z-]+)`")
VARIABLE = re.compile(r"(?<![\w.$-])[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+(?!\w)")
ASSIGNED = re.compile(r"^#? *([A-Z][A-Z0-9_]*)=|(?<!\w)([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)(?!\w)", re.MULTILINE)

# Names that are not Headwater's own: the platform's, the tools', and parts of others.
FOREIGN = re.compile(
    r"RAILWAY_\w+|UV_\w+|PYTHON\w+|ARROW_\w+|PIP_\w+|DATABASE_URL|ACCESS_KEY_ID|SECRET_ACCESS_KEY|AF_\w+|SQL_ASCII"
    r"|REQUESTS_CA_BUNDLE|SSL_CERT_FILE|PYTEST_\w+"
)
PLACEHOLDERS = {"BUCKET_ID", "DEEP_ARCHIVE", "S3_PATH"}
PLANNED_COMMANDS = {"demo", "run", "backfill", "check", "keys", "serve"}


def named_by(pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        for found in pattern.findall(document.read_text(encoding="utf-8")):
            yield str(document.relative_to(ROOT)), found


def known_variables() -> set[str]:
    example = ROOT / ".env.example"
    if not example.exists():
        absent(".env.example does not exist yet")
    return {name for pair in ASSIGNED.findall(example.read_text(encoding="utf-8")) for name in pair if name}


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_documents_to_check() -> None:
    assert len(DOCUMENTS) > 10


def test_every_relative_link_leads_to_a_file_and_its_heading() -> None:
    broken = []
    for document in DOCUMENTS:
        for link in LINK.findall(document.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (document.parent / path).resolve() if path else document
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{document.relative_to(ROOT)}: {link}")
    assert not broken


def test_every_page_that_code_or_configuration_names_exists() -> None:
    folders = ("src", "tests", "bench", "tools", "deploy", ".github")
    files = (
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".toml", ".yaml"}
    )
    texts = (path.read_text(encoding="utf-8") for path in (*files, *ROOT.glob("*.toml"), *ROOT.glob("*.yaml")))
    named = {page for text in texts for page in PAGE.findall(text)}
    assert "docs/decisions/telemetry.md" in named
    assert {page for page in named if not (ROOT / page).exists()} == set()


def test_every_package_that_the_readme_lists_is_installed_and_imported() -> None:
    """Those for development in tests or benchmarks, all others in the daemon."""
    _, _, section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Packages")
    rows = re.findall(r"^\| ([\w\[\]-]+) \| (.+) \|$", section.partition("\n## ")[0], re.MULTILINE)[1:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    direct = [*project["project"]["dependencies"], *(pin for extra in extras for pin in extra)]
    development = project["dependency-groups"]["dev"]
    assert rows
    for package, use in rows:
        pins, folders = (development, ("tests", "bench")) if use.startswith("development") else (direct, ("src/app",))
        assert any(pin.startswith(f"{package.lower()}==") for pin in pins), package
        files = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
        module = IMPORTED_AS.get(package, package.replace("-", "_"))
        used = re.compile(rf"^\s*(import|from) {re.escape(module)}\b", re.MULTILINE)
        assert any(used.search(path.read_text(encoding="utf-8")) for path in files), package


def test_every_command_that_a_document_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    named = {command for _, command in named_by(COMMAND)}
    assert named, "no document names a command"
    if find_spec("app.__main__") is None:
        assert named <= PLANNED_COMMANDS
        return
    for command in sorted(named):
        with pytest.raises(SystemExit) as ended:
            parsed([command, "--help"])
        assert ended.value.code == 0, command
        assert capsys.readouterr().out.startswith(f"usage: python -m app {command} ")


def test_every_make_target_that_a_document_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {target for _, target in named_by(TARGET)} <= targets


def test_every_variable_that_a_document_names_is_known() -> None:
    known = known_variables() | PLACEHOLDERS
    unknown = {(where, name) for where, name in named_by(VARIABLE) if name not in known and not FOREIGN.fullmatch(name)}
    assert not unknown
