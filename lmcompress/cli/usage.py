"""Errors of a command line as one message: unknown verbs and options, options given twice.

typer carries its own copy of click from 0.16 on and depends on click before that: the error classes are taken from
typer's, so that either is caught and click itself is never imported.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lmcompress.errors import LmcompressError, nearest


def _ancestor(name: str) -> type[Exception]:
    return next(parent for parent in typer.BadParameter.__mro__ if parent.__name__ == name)


CommandLineError: Any = _ancestor("ClickException")
"""The exception click raises for a command line it cannot parse."""


class Verb(TyperCommand):
    """A command that refuses an option given twice, unless it collects several values.

    Args:
        name: name of the command.
        help: its help. Each paragraph becomes one line, that rich wraps at the width of the terminal: typer keeps the
            line breaks of the source in all paragraphs but the first.
        arguments: what else typer's command takes.
    """

    def __init__(self, name: str | None, *, help: str | None = None, **arguments: Any) -> None:
        super().__init__(name, help=help and re.sub(r"(?<=\S)\n(?=\S)", " ", help), **arguments)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments that remain after parsing.

        Args:
            ctx: context of the command.
            args: the command line after the command's name.

        Raises:
            LmcompressError: If an option that takes one value is given twice.
        """
        if args and not ctx.resilient_parsing:
            _, _, found = self.make_parser(ctx).parse_args(args=list(args))
            times = Counter(
                param.opts[0] for param in found if param.param_type_name == "option" and not param.multiple
            )
            if twice := [name for name, count in times.items() if count > 1]:
                raise LmcompressError(f"{twice[0]} is given twice: remove one of the two")
        return super().parse_args(ctx, args)


class Verbs(TyperGroup):
    """A group of commands whose error for an unknown name suggests the nearest command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The name of the command, the command and its arguments.

        Args:
            ctx: context of the group.
            args: the command line from the command's name on.

        Raises:
            LmcompressError: If there is no such command.
        """
        name = args[0] if args else "-"
        if not name.startswith("-") and name not in self.commands:
            raise LmcompressError(f"no command {name!r}{nearest(name, self.commands)}")
        return super().resolve_command(ctx, args)


def usage_message(error: Any) -> str:
    """The error of a command line, with the nearest valid name and where to read more.

    Args:
        error: a :data:`CommandLineError`.
    """
    context = getattr(error, "ctx", None)
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    if context is None:
        return message
    if (option := getattr(error, "option_name", None)) and hasattr(error, "possibilities"):
        names = [name for param in context.command.params for name in (*param.opts, *param.secondary_opts)]
        valid = [name for name in names if name.startswith("--")]
        message = f"no option {option}{nearest(option, [*valid, '--help'])}"
    return f"{message}; see {_program(context)} --help"


def _program(context: Any) -> str:
    path = str(context.command_path)
    return path if path.startswith("lmcompress") else " ".join(["lmcompress", *path.split()[1:]])
