"""The generated reference: complete, current, and an `.env.example` that starts the product."""

from pathlib import Path

import pytest

from app.config.environment import load_settings
from app.config.reference import BEGIN, END, descriptions, env_example, main, table, with_table
from app.config.rules import VARIABLES

ROOT = Path(__file__).parent.parent
NAMES = sorted({name for variable in VARIABLES for name in variable.names})


def assignments(text: str) -> list[str]:
    return [line[1:] for line in text.splitlines() if line.startswith("#") and not line.startswith(("# ", "#  "))]


def test_the_committed_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"], ROOT) == 0, capsys.readouterr().out


def test_the_example_sets_nothing_and_starts_the_product(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(env_example(), encoding="utf-8")
    assert load_settings({}, tmp_path / ".env") == load_settings({}, None)
    assert not [line for line in env_example().splitlines() if line and not line.startswith("#")]


def test_the_example_with_every_line_in_force_says_the_defaults(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("\n".join(assignments(env_example())), encoding="utf-8")
    assert load_settings({}, tmp_path / ".env") == load_settings({}, None)


def test_the_example_names_each_variable_once() -> None:
    names = [line.partition("=")[0] for line in assignments(env_example())]
    assert len(names) == len(set(names))
    assert {variable.names[0] for variable in VARIABLES} == set(names)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_in_both_references(name: str) -> None:
    assert f"`{name}`" in table()
    assert name in env_example()


def test_each_variable_says_what_it_is_for() -> None:
    assert all(descriptions().get(variable.goes_to) for variable in VARIABLES)


def test_the_rest_of_the_readme_is_left_alone() -> None:
    readme = f"before\n{BEGIN}\nstale-text\n{END}\nafter\n"
    written = with_table(readme)
    assert written.startswith(f"before\n{BEGIN}\n")
    assert written.endswith(f"{END}\nafter\n")
    assert "stale-text" not in written
    assert with_table(written) == written


def test_a_readme_without_the_markers_is_not_touched() -> None:
    with pytest.raises(ValueError, match="put both lines"):
        with_table("before")


def test_the_check_shows_the_difference_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    assert main(["--check"], tmp_path) == 1
    assert "+| `PORT` | `8080` |" in capsys.readouterr().out
    assert not (tmp_path / ".env.example").exists()
    assert main([], tmp_path) == 0
    assert main(["--check"], tmp_path) == 0
