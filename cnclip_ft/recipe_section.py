"""What all sections of a recipe share: refusals of what is no key or no value, and types that stand in many."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Language = Literal["zh", "en", "mixed"]

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


def _place(path: str) -> str:
    if not path.strip() or "\0" in path or len(path.encode("utf-8", "replace")) > 4000:
        raise ValueError("a path is needed here")
    return path


Place = Annotated[str, AfterValidator(_place)]


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
