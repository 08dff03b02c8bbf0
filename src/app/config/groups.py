"""The base of all settings groups: a model whose fields are variables, each with its names, default and purpose."""

import re
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, field_validator

COMMENT = re.compile(r"\s+#.*$", re.DOTALL)


def variable(names: str, *, default: object, unset: str = "", shown: str | None = None, **limits: Any) -> Any:
    """A field of a group, set by the first of `names` that is present; the string below the field documents it.

    `default` may be a function of the fields above it. `unset` describes what happens without a value, where the
    default does not show it; `shown` is the readable form of the default, where it differs from its text.
    """
    given = {"default_factory": default} if callable(default) else {"default": default}
    return Field(
        **given,
        validation_alias=AliasChoices(*names.split()),
        json_schema_extra={"unset": unset, "shown": shown},
        **limits,
    )


class SettingsGroup(BaseModel):
    """The settings of one part, named by the `title` of its class. It is given every variable and picks its own."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, defer_build=True, hide_input_in_errors=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _read(cls, text: Any, read: ValidatorFunctionWrapHandler) -> Any:
        """Strip a trailing comment, which `docker run --env-file` passes on with the value, if the value is invalid
        with it.
        """
        try:
            return read(text)
        except ValueError:
            bare = COMMENT.sub("", text)
            if bare in ("", text):
                raise
        return read(bare)
