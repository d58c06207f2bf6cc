"""How stores are built: the options that `data build`, `import` and `export` share, and what they ask before they begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from data_tools.tables import note

Threads = Annotated[int, typer.Option("--workers", help="Threads that read, check and re-encode pictures.")]


@dataclass(frozen=True)
class Building:
    """How a store is built: what `build` and `import` share."""

    layout: Annotated[str, typer.Option(help="plain (ours) or official (what cn_clip reads).")] = "plain"
    shard_size: Annotated[int | None, typer.Option(help="Images a shard; without it the store is in one piece.")] = None
    max_side: Annotated[int | None, typer.Option(help="Shrink pictures to this longer side, in pixels.")] = None
    quality: Annotated[
        int | None, typer.Option(help="Re-encode pictures with this quality, 1 to 100 (85 with --max-side).")
    ] = None
    image_format: Annotated[str, typer.Option(help="jpeg or webp, for re-encoded pictures.")] = "jpeg"
    pixel_limit: Annotated[int | None, typer.Option(help="Refuse pictures of more pixels (179 million).")] = None
    language: Annotated[str, typer.Option(help="Of texts that do not say: zh, en, mixed, or detect.")] = "detect"
    on_error: Annotated[
        str, typer.Option(help="fail: stop at the first fault; skip: list it in faults.jsonl and go on.")
    ] = "fail"
    max_faults: Annotated[int, typer.Option(help="With skip: stop above this many.")] = 1000
    resume: Annotated[bool, typer.Option("--continue", help="Go on with an interrupted build of the same data.")] = (
        False
    )
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the stores that are there (stores only).")] = (
        False
    )
    workers: Threads = 0

    def arguments(self) -> dict[str, Any]:
        """For `build_store`; refused where they make no sense.

        Raises:
            RequestError: naming the flag.
        """
        from data_tools.errors import RequestError
        from data_tools.language import LANGUAGES
        from data_tools.pictures import PIXEL_LIMIT, Reencoding

        for name, known in (
            ("layout", ("plain", "official")),
            ("on_error", ("fail", "skip")),
            ("language", (*LANGUAGES, "detect")),
        ):
            if getattr(self, name) not in known:
                raise RequestError(f"{_flag(name)} {getattr(self, name)!r}: one of {', '.join(known)}")
        for name, least in (("shard_size", 1), ("workers", 0), ("max_faults", 0), ("pixel_limit", 1)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise RequestError(f"{_flag(name)} {number}: at least {least}")
        reencoding = None
        if self.max_side is not None or self.quality is not None:
            reencoding = Reencoding(self.max_side, self.quality, self.image_format)
        elif self.image_format != "jpeg":
            raise RequestError("--image-format is for re-encoded pictures; add --max-side or --quality")
        spoken_for = {"max_side", "quality", "image_format"}
        given = {name: value for name, value in vars(self).items() if name not in spoken_for}
        return given | {"reencoding": reencoding, "pixel_limit": self.pixel_limit or PIXEL_LIMIT}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def comma_list(value: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


def refuse_targets(targets: Iterable[Path], read: list[Path], building: Building, *, inside: bool) -> None:
    """Every place is free or may be replaced, before the first store is built."""
    from data_tools.outputs import refuse_overlap
    from data_tools.store import refuse_place

    for target in targets:
        refuse_overlap(target, read, inside=inside)
        if not building.resume:  # what an interrupted build was allowed, going on with it is: that is looked at there
            refuse_place(target, overwrite=building.overwrite)


@contextmanager
def interruptible() -> Iterator[None]:
    """Say on Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        note("stopped; the old store, if there was one, is untouched. The same command with --continue goes on.")
        raise typer.Exit(130) from None
