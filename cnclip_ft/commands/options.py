"""Options that several commands share: each is stated once, with its help."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from cnclip_ft.evaluation.options import Options

Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder or file, or a published name.")
]
Store = Annotated[Path, typer.Argument(metavar="STORE", help="<dir>/<split>, or shards: a pattern or a folder.")]
PageLanguage = Annotated[str | None, typer.Option("--language", help="Of the page: zh or en. [default: the system's]")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at once; texts go in batches twice as large.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that decode images. [default: 0 on the CPU, else up to 8]")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps. [default: auto, the best there is]")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: precision of the towers.")]
ImageSize = Annotated[int | None, typer.Option(help="Another image size than the checkpoint's.")]
Dimensions = Annotated[
    int | None, typer.Option(min=1, help="Keep the first so many numbers of a feature. [default: all]")
]
Memory = Annotated[str, typer.Option(help="Bound for what a search holds beside the features, e.g. 512MiB.")]
OnError = Annotated[
    str,
    typer.Option(
        help="Pictures that cannot be used: report (go on, list them, exit 1 at the end), skip (the same, exit 0) or fail (stop at the first)."
    ),
]
Hub = Annotated[str, typer.Option("--source", help="Where a published name comes from: huggingface or modelscope.")]
TrustImport = Annotated[
    bool,
    typer.Option(
        "--trust-import",
        help="Import the code a checkpoint names for its image tower (docs/towers.md#your-own-image-tower-by-import-path).",
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result with all settings as JSON.")
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONDITION", help="A condition on a column that is kept; may be repeated: 类目=女装 or '价格<100'."
    ),
]
Picture = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw it (.png, .svg, .pdf); needs cnclip-ft[plots].")
]


@dataclasses.dataclass(frozen=True)
class Towers:
    """How the towers are run."""

    batch_size: BatchSize = Options.batch_size
    workers: Workers = Options.workers
    device: Device = Options.device
    dtype: Dtype = Options.dtype


@dataclasses.dataclass(frozen=True)
class Encoding(Towers):
    """The same, where the image size and the width of the features are free."""

    image_size: ImageSize = Options.image_size
    dimensions: Dimensions = Options.dimensions


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from, and whether the code it names may be run."""

    source: Hub = Options.source
    trust_import: TrustImport = Options.trust_import


def defaults(command: Callable[..., None]) -> dict[str, Any]:
    """Options of a command as they are when none is given, for a command that goes on with another."""
    parameters = inspect.signature(command).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A parameter whose type is a dataclass stands for an option a field: they are stated once, with their defaults."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if not (isinstance(parameter.annotation, type) and dataclasses.is_dataclass(parameter.annotation)):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        group = groups[parameter.name] = parameter.annotation
        hints = get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            made = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
            parameters.append(made.replace(annotation=hints[field.name]))

    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    return run
