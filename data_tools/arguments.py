"""Arguments of public calls: a value of another type than a call takes is answered in words, before anything is done."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_type_hints

import numpy as np

from data_tools.errors import RequestError

Call = TypeVar("Call", bound=Callable[..., Any])


def typed(call: Call) -> Call:
    """`call`, with its arguments held against its annotations.

    Raises:
        RequestError: one is of another type; the message names it, what it is and what is taken.
    """
    signature = inspect.signature(call)

    @functools.wraps(call)
    def checked(*given: Any, **named: Any) -> Any:
        bound = signature.bind(*given, **named)  # a wrong number or name of arguments is Python's to say
        for name, value in bound.arguments.items():
            many = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            for one in value if many else (value,):
                _check(call, name, one)
        return call(*given, **named)

    return checked  # type: ignore[return-value]  # functools.wraps keeps the signature


def _check(call: Callable[..., Any], name: str, value: Any) -> None:
    from pydantic import ValidationError

    try:
        _adapter(call, name).validate_python(value.item() if isinstance(value, np.generic) else value, strict=True)
    except ValidationError:
        written = str(inspect.signature(call).parameters[name].annotation).replace("Sequence[str]", "a list of texts")
        one = f"; write [{value!r}]" if isinstance(value, str) and "a list of texts" in written else ""
        raise RequestError(
            f"{call.__name__}: {name} is {_short(value)} ({type(value).__name__}); it takes {written.replace(' | ', ' or ')}{one}"
        ) from None


def _short(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= 80 else f"{written[:77]}…"


@functools.cache
def _adapter(call: Callable[..., Any], name: str) -> Any:
    """What says whether a value is of the annotated type. A class that only checkers import is held to be no type of Python's own."""
    from pydantic import AfterValidator, ConfigDict, TypeAdapter

    written = call.__annotations__[name]
    places = dict(vars(inspect.getmodule(call)))
    while True:
        try:
            hint = get_type_hints(_Named(written), places, include_extras=True)["it"]
            break
        except NameError as error:
            places[str(error.name)] = Annotated[Any, AfterValidator(_of_a_library)]
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:  # noqa: BLE001 - a model or data class brings its own rules: then without ours
        return TypeAdapter(hint)


def _of_a_library(value: Any) -> Any:
    if type(value).__module__ == "builtins":
        raise ValueError
    return value


class _Named:
    """A holder of one annotation."""

    def __init__(self, written: Any) -> None:
        self.__annotations__ = {"it": written}
