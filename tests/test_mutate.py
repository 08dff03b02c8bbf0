"""The tool that changes modules: it changes what can matter, one thing at a time, and the text stays a program."""

import ast
import runpy
from pathlib import Path

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "mutate.py"))
SOURCE = '''"""Text."""
LIMIT = 1 + 1

def f(a: "int | None" = 3, *, b: bool = True) -> int:
    """Text."""
    log.info("%d", a + 1)
    é = a and not b
    if a < LIMIT < 5:
        raise ValueError(f"{a + 1} é")
    self.count += 2
    self.seen(f"{a * 2}")
    return a if é else -1
'''


def test_each_change_is_one_thing_inside_a_function_less_logs_annotations_and_texts() -> None:
    assert [change.what for change in TOOL["changes_of"](SOURCE)] == [
        "a and (not b)  ->  (a or not b)",
        "a and (not b)  ->  (not b)",
        "a and (not b)  ->  (a)",
        "not b  ->  (b)",
        "a < LIMIT < 5  ->  (a <= LIMIT < 5)",
        "a < LIMIT < 5  ->  (a < LIMIT <= 5)",
        "5  ->  (6)",
        "raise ValueError(f'{a + 1} é')  ->  pass",
        "self.count += 2  ->  pass",
        "2  ->  (3)",
        "self.seen(f'{a * 2}')  ->  pass",
        "return a if é else -1  ->  return None",
        "a if é else -1  ->  (-1 if é else a)",
        "1  ->  (2)",
    ]


def test_every_changed_text_is_another_program() -> None:
    before = ast.dump(ast.parse(SOURCE))
    assert before not in {ast.dump(ast.parse(change.source)) for change in TOOL["changes_of"](SOURCE)}
