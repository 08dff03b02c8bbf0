"""The declared variables as a person meets them: in the reference, in a fault, in a warning; told from the models."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_origin

from pydantic.fields import FieldInfo

from app.config.masking import text_of
from app.config.settings import Settings, SettingsGroup
from app.config.value_types import Allowed


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting. `title` is that of its group, `goes_to` is `group.field`.

    `default` is written as a person would, "" where `unset` says what happens then.
    """

    title: str
    goes_to: str
    names: tuple[str, ...]
    default: str
    unset: str
    allowed: Allowed


def _allowed(field: FieldInfo) -> Allowed:
    """What the type says of itself, or else what its limits or its literals say."""
    said = [each for each in field.metadata if isinstance(each, Allowed)]
    if said:
        return said[-1]
    if get_origin(field.annotation) is Literal:
        return Allowed(f"one of {', '.join(get_args(field.annotation))}")
    limits = {name: getattr(each, name) for each in field.metadata for name in ("ge", "le") if hasattr(each, name)}
    number = "a number" if field.annotation is float else "a whole number"
    return Allowed(f"{number} from {limits['ge']} to {limits['le']}")


def _default(field: FieldInfo, shown: str | None) -> str:
    if shown is not None or field.default_factory is not None:
        return shown or ""
    return f"{field.default:g}" if isinstance(field.default, float) else text_of(field.default)


def _variables(group: str, model: type[SettingsGroup]) -> Iterator[Variable]:
    for name, field in model.model_fields.items():
        words = cast("dict[str, Any]", field.json_schema_extra)
        yield Variable(
            title=str(model.model_config.get("title")),
            goes_to=f"{group}.{name}",
            names=tuple(cast("Any", field.validation_alias).choices),
            default=_default(field, words["shown"]),
            unset=words["unset"],
            allowed=_allowed(field),
        )


GROUPS = {name: cast("type[SettingsGroup]", field.annotation) for name, field in Settings.model_fields.items()}
VARIABLES = tuple(variable for group, model in GROUPS.items() for variable in _variables(group, model))
