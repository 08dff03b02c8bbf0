"""What a setting is: the form in which every variable is declared.

Invariant: a declaration holds no value of this process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from app.config.kinds import Kind


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting. `goes_to` is `group.field`; `default` is written as a person would, "" = `kind.empty`.

    `unset` says what happens then, where the default does not say it itself.
    """

    goes_to: str
    names: tuple[str, ...]
    kind: Kind
    default: str
    meaning: str
    unset: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """The variables of one part of the product, under a title."""

    title: str
    variables: Sequence[Variable]


def of(group: str, *rows: tuple[str, str, Kind, str, str] | tuple[str, str, Kind, str, str, str]) -> list[Variable]:
    """Variables of one group, from rows of field, names, kind, default, meaning and, where needed, `unset`."""
    return [
        Variable(f"{group}.{field}", tuple(names.split()), kind, default, meaning, *unset)
        for field, names, kind, default, meaning, *unset in rows
    ]
