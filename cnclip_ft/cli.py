"""The command. It only assembles: each subcommand stands in `cnclip_ft.commands` and imports its room when called."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from typing import Annotated

import typer

from cnclip_ft import __version__
from cnclip_ft.commands import (
    average,
    benchmark,
    calibrate,
    classify,
    compare,
    data,
    encode,
    evaluate,
    export,
    ground,
    recipe,
    scripts,
    search,
    topk,
    train,
    tune,
)
from cnclip_ft.commands.sections import section_for
from data_tools.errors import UserError
from data_tools.tables import note
from data_tools.terminal import use_plain_streams
from data_tools.words import language_of

app = typer.Typer(
    name="cnclip-ft",
    help="Fine-tune Chinese(-English) CLIP models in two stages: data, training, recall, export, search.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cnclip-ft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None: ...


app.add_typer(data.app, name="data")
app.add_typer(search.app, name="search")
app.add_typer(recipe.app, name="recipe")
for function in (
    train.plan,
    train.train,
    tune.tune,
    evaluate.evaluate,
    benchmark.benchmark,
    encode.encode,
    topk.topk,
    classify.classify,
    calibrate.calibrate,
    compare.compare,
    average.average,
    ground.ground,
    export.export,
    scripts.scripts,
):
    app.command()(function)


def main() -> None:
    """Run the command. Exit 0: done; 1: the work failed; 2: the request was wrong; 130: stopped on request."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # processes started from here do not import from the working folder
    use_plain_streams()
    code: str | int | None = 0
    try:
        app(prog_name="cnclip-ft")  # also under `python -m cnclip_ft`
    except SystemExit as left:
        if isinstance(getattr(left.__context__, "__cause__", None), KeyboardInterrupt):  # typer makes it an exit
            _say("interrupted")
        code = left.code
    except UserError as error:
        _say(f"error: {error}")
        section = section_for(str(error), language_of(None), sys.argv[1:])
        if section is not None:
            _say(f"more: {section}")
        code = error.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    except BrokenPipeError:  # `… | head`: the reader has what it wanted
        code = 1
    except OSError as error:
        names = " → ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        _say(f"error: {names + ': ' if names else ''}{error.strerror or error}{_mend(error)}")
        code = 1
    ended = code if isinstance(code, int) else int(code is not None)
    # All is done. From here on Ctrl-C leaves at once: a traceback of an interpreter that takes itself apart helps nobody.
    signal.signal(signal.SIGINT, lambda *_: _leave(ended))
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # Python flushes once more at its end  # noqa: SIM115
        code = code or 1
    if os.environ.get("WORLD_SIZE", "1") != "1" and not isinstance(code, str):
        # One of several processes: gloo's threads may outlive its groups, which FSDP2 holds to the end, and an interpreter that takes
        # itself apart then aborts. A run that is done would count as failed. All that was to be written is.
        _leave(code or 0)
    sys.exit(code)


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # the last: it is being flushed
            stream.flush()
    os._exit(code)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        note(text)


def _mend(error: OSError) -> str:
    known = {
        errno.ENOSPC: "Free some space, then give the command again",
        getattr(errno, "EDQUOT", -1): "Your quota is used up: remove something, then give the command again",
        errno.EACCES: "Choose a place you may use, or change its rights",
        errno.EROFS: "Choose a place that can be written",
        errno.ENAMETOOLONG: "Choose a shorter name",
        errno.ELOOP: "The links lead in a circle: name the real place",
        errno.EMFILE: "Too many files are open: raise the limit (ulimit -n), or use fewer workers",
    }
    return f". {known[error.errno]}." if error.errno in known else ""
