"""The program ``lmcompress``: its verbs and the handling of their errors."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version as version_of
from typing import Annotated

import typer
from rich.markup import escape

from lmcompress.cli.benchmark import benchmark
from lmcompress.cli.compare import compare
from lmcompress.cli.console import error_console
from lmcompress.cli.evaluate import evaluate
from lmcompress.cli.export import export
from lmcompress.cli.families import families
from lmcompress.cli.frontier import frontier
from lmcompress.cli.inspect import inspect
from lmcompress.cli.prune import prune
from lmcompress.cli.push import push
from lmcompress.cli.quantize import quantize
from lmcompress.cli.quickstart import quickstart
from lmcompress.cli.recipes import recipes_app
from lmcompress.cli.run import run
from lmcompress.cli.sensitivity import sensitivity
from lmcompress.cli.usage import CommandLineError, Verb, Verbs, usage_message
from lmcompress.errors import LmcompressError

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 plus the number of the signal."""

TERMINATED = 143
"""Exit code after SIGTERM, as batch systems and containers send it."""

_RESUMABLE = ("run", "quickstart", "frontier")

app = typer.Typer(
    name="lmcompress",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Compress transformer language models by distillation, pruning and quantization.\n\n"
    "Start here:  [bold]lmcompress quickstart[/]  trains a teacher, distils a student from it and compares them, "
    "in some minutes on a CPU.",
)
_VERBS = (
    *(run, quickstart, evaluate, benchmark, inspect, compare, prune, sensitivity, frontier, quantize, export, push),
    families,
)
for _verb in _VERBS:
    _panel = "Pruning" if _verb in (prune, sensitivity, frontier) else None
    app.command(cls=Verb, no_args_is_help=_verb not in (quickstart, families), rich_help_panel=_panel)(_verb)
app.add_typer(recipes_app, name="recipes")


def main() -> None:
    """The entry point of ``lmcompress``."""
    # by an exception, so that temporary folders are deleted
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run_app(sys.argv[1:]))


def run_app(arguments: list[str]) -> int:
    """Run a command line; any error becomes one message, with a traceback only after ``--debug``.

    Args:
        arguments: arguments without the program's name.

    Returns:
        The exit code: 0; 2 for errors the user can correct; 1 for a fault of lmcompress or its libraries; 130 after
        Ctrl-C.
    """
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(arguments, prog_name="lmcompress", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except CommandLineError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            _print_error(usage_message(error))
        return 2
    except LmcompressError as error:
        if debug:
            raise
        _print_error(str(error))
        return 2
    except BrokenPipeError:
        # whoever read the output has enough of it; what is left to write at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.strerror is not None and not isinstance(error, ConnectionError):
            where = "" if error.filename is None else f"cannot use {error.filename}: "
            _print_error(f"{where}{error.strerror.lower()}")
            return 2
        first = next(iter(str(error).splitlines()), "") or "no message"
        _print_error(
            f"{type(error).__name__}: {first}\nthis is a fault of lmcompress or its libraries; run again with --debug "
            "for the traceback"
        )
        return 1
    if code == INTERRUPTED:
        resumes = next((word for word in arguments if not word.startswith("-")), "") in _RESUMABLE
        then = "the same command resumes from the last checkpoint" if resumes else "the same command starts over"
        error_console().print(f"stopped; {then}", style="yellow")
    return code if isinstance(code, int) else 0


def _terminate(*_: object) -> None:
    raise SystemExit(TERMINATED)


def _print_error(message: str) -> None:
    error_console().print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmcompress {version_of('lmcompress')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    del debug, version
