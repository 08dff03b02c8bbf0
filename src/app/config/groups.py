"""What every group of settings is: a model whose fields are variables, each with its names, default and purpose."""

import re
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, field_validator

COMMENT = re.compile(r"\s+#.*$", re.DOTALL)


def variable(names: str, *, default: object, unset: str = "", shown: str | None = None, **limits: Any) -> Any:
    """A field of a group, called by the first of `names` that is set; the text below it says what it is for.

    `default` may be a function of the fields above it. `unset` says what happens then where the default does not say it
    itself; `shown` is the default as a person would write it where that is not its text.
    """
    given = {"default_factory": default} if callable(default) else {"default": default}
    return Field(
        **given,
        validation_alias=AliasChoices(*names.split()),
        json_schema_extra={"unset": unset, "shown": shown},
        **limits,
    )


class SettingsGroup(BaseModel):
    """The settings of one part, under the `title` of its class. It is given every variable and takes its own."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, defer_build=True, hide_input_in_errors=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _read(cls, text: Any, read: ValidatorFunctionWrapHandler) -> Any:
        """A trailing comment, which `docker run --env-file` hands on with the value, is cut where that helps."""
        try:
            return read(text)
        except ValueError:
            bare = COMMENT.sub("", text)
            if bare in ("", text):
                raise
        return read(bare)
