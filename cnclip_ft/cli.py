"""The command. It only assembles: each subcommand stands in `cnclip_ft.commands` and imports its room when called."""

from __future__ import annotations

import os
import sys

import typer

from cnclip_ft.commands import data, evaluate, export, search, train
from data_tools.errors import UserError
from data_tools.terminal import use_plain_streams

app = typer.Typer(
    name="cnclip-ft",
    help="Fine-tune Chinese(-English) CLIP models in two stages: data, training, recall, export, search.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data.app, name="data")
app.add_typer(search.app, name="search")
for function in (
    train.plan, train.train, evaluate.evaluate, evaluate.encode, evaluate.topk, evaluate.classify,
    evaluate.calibrate, evaluate.compare, export.export,
):  # fmt: skip
    app.command()(function)


def main() -> None:
    """Run the command. Exit 0: done; 1: the work failed; 2: the request was wrong."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # processes started from here do not import from the working folder
    use_plain_streams()
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
