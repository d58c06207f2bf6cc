"""What all sections of a recipe share: refusals of what is no key or no value, and types that stand in many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

Language = Literal["zh", "en", "mixed"]

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


def _place(path: str) -> str:
    if not path.strip() or "\0" in path or len(path.encode("utf-8", "replace")) > 4000:
        raise ValueError("a path is needed here")
    return path


Place = Annotated[str, AfterValidator(_place)]


class OneOf:
    """Beside `str`: one of the names in a table, which may grow."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = known

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        if name not in self.known:
            known = " or ".join(map(repr, self.known))
            raise PydanticCustomError("literal_error", "Input should be {known}", {"known": known})
        return name


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, content: Any) -> Any:
        for name, value in content.items() if isinstance(content, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and "bool" not in str(field.annotation):
                raise ValueError(f"{name} is {str(value).lower()}, which is no value for it")
        return content
