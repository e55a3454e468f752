"""What all tables of settings have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

__all__ = ["Section"]


class Section(BaseModel):
    """A table of settings: its keys are known, its values are checked and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _boolean_is_no_number(cls, values: Any) -> Any:
        # pydantic would take true for 1.
        for name, value in values.items() if isinstance(values, dict) else ():
            number = name in cls.model_fields and cls.model_fields[name].annotation in (int, float)
            among = isinstance(value, list) and any(isinstance(one, bool) for one in value)
            if among or (number and isinstance(value, bool)):
                raise PydanticCustomError(
                    "boolean", "expected a number, got {value}", {"value": str(value), "field": name}
                )
        return values
