"""The program as a whole: instant help, one message for what is wrong, and no traceback unasked."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from lmcompress import cli
from lmcompress.cli import application
from lmcompress.errors import LmcompressError


def commands(group=None, path=()):
    """Every command, as the words that call it."""
    group = group or typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = {" ".join(words): command for words, command in commands()}


def test_the_verbs_are_those_of_the_issue():
    assert {name.split()[0] for name in COMMANDS} == {
        *("run", "quickstart", "evaluate", "benchmark", "inspect", "compare", "prune", "sensitivity", "frontier"),
        *("quantize", "export", "push", "recipes", "families"),
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_two_examples(command):
    result = CliRunner().invoke(cli.app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert result.output.split("Examples:")[1].count(f"lmcompress {command}") >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_paragraphs_of_the_help_are_wrapped_by_the_terminal_alone(command):
    for paragraph in COMMANDS[command].help.split("\n\n"):
        assert "\n" not in paragraph.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_options_is_complete_phrases(command):
    for param in COMMANDS[command].params:
        words = param.help if hasattr(param, "help") else ""
        assert words and words[0].isupper() and words.endswith("."), f"{param.name}: {words!r}"
        assert not words.startswith("Of "), f"{param.name}: {words!r}"


def test_the_first_help_says_where_to_start():
    assert "lmcompress quickstart" in CliRunner().invoke(cli.app, ["--help"]).output


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["prune", "--help"], ["evaluate", "m"], ["rnu"]])
def test_what_computes_nothing_imports_neither_torch_nor_transformers(arguments):
    script = (
        f"import sys; from lmcompress import cli; code = cli.run_app({arguments})\n"
        "sys.exit(str(sorted({'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1:] in ([], [""]) or "[" not in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "no command 'rnu'; did you mean 'run'? Valid are: benchmark, compare,"),
        (["recipes", "shw"], "no command 'shw'; did you mean 'show'?"),
        (["run", "x", "--dryrun"], "no option --dryrun; did you mean '--dry-run'? Valid are: --dry-run, --help,"),
        (["--vresion"], "no option --vresion; did you mean '--version'?"),
        (["evaluate", "m"], "missing option '--task'; see lmcompress evaluate --help"),
        (["push", "folder"], "missing argument 'repository'; see lmcompress push --help"),
        (["push", "a", "b/c", "d"], "unexpected extra argument"),
        (["evaluate", "m", "--task"], "option '--task' requires an argument"),
        (["benchmark", "m", "--repeats", "few"], "invalid value for '--repeats'"),
        (["evaluate", "m", "--task", "a", "--task", "b"], "--task is given twice"),
        (["run", "x", "-o", "a", "--output", "b"], "--output is given twice"),
        (["run", "x", "--resume", "--no-resume"], "--resume is given twice"),
    ],
)
def test_errors_of_usage_are_one_message_and_exit_code_2(arguments, message, capsys):
    assert cli.run_app(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("error:") == 1
    assert "Traceback" not in captured.err and "Usage" not in captured.err and not captured.out


def test_lists_may_be_given_several_times(capsys):
    arguments = ["frontier", "m", "--task", "t", "--sparsity", "0.5", "--sparsity", "0.5"]
    assert cli.run_app(arguments) == 2
    assert "none twice" in capsys.readouterr().err


def test_debug_shows_the_traceback_wherever_it_stands():
    for arguments in (["--debug", "run", "nope"], ["run", "nope", "--debug"]):
        with pytest.raises(LmcompressError, match="no recipe 'nope'"):
            cli.run_app(arguments)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory\nat somewhere"), ConnectionError(104, "reset"), KeyError("x")]
)
def test_a_fault_of_ours_is_one_message_too(error, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("lmcompress.checkpoint.pushing.check_name", fail)
    arguments = ["push", "folder", "me/it"]
    assert cli.run_app(arguments) == 1
    shown = capsys.readouterr().err
    assert f"error: {type(error).__name__}: {str(error).splitlines()[0]}" in shown
    assert "run again with --debug for the traceback" in shown and "Traceback" not in shown
    with pytest.raises(type(error)):
        cli.run_app(["--debug", *arguments])


def _pushes(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("lmcompress.checkpoint.pushing.check_name", fail)
    return cli.run_app(["push", "folder", "me/it"])


def test_what_the_system_refuses_is_no_fault_of_ours(monkeypatch, capsys):
    assert _pushes(OSError(28, "No space left on device"), monkeypatch) == 2
    assert "error: no space left on device\n" in capsys.readouterr().err
    assert _pushes(PermissionError(13, "Permission denied", "out/model"), monkeypatch) == 2
    assert "error: cannot use out/model: permission denied\n" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_refused(capsys):
    assert cli.run_app(["run", 300 * "x"]) == 2
    assert "file name too long" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["recipes", "schema"], ["recipes", "list"], ["run", "--help"]])
def test_whoever_has_read_enough_hears_nothing(arguments):
    program = [sys.executable, "-m", "lmcompress", *arguments]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "patched", "message"),
    [
        (["run", "quickstart"], "lmcompress.recipes.run", "stopped; the same command resumes from the last checkpoint"),
        (
            ["push", "folder", "me/it"],
            "lmcompress.checkpoint.pushing.check_name",
            "stopped; the same command starts over",
        ),
    ],
)
def test_ctrl_c_says_what_the_same_command_does(arguments, patched, message, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(patched, interrupt)
    assert cli.run_app(arguments) == application.INTERRUPTED == 130
    assert message in capsys.readouterr().err


_STOPPED_WHILE_WRITING = """
import os, signal, sys, time
from pathlib import Path
from lmcompress.checkpoint.saving import replaced_folder
from lmcompress.cli import application

def write(arguments):
    with replaced_folder(Path("made")) as folder:
        (folder / "weights").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

application.run_app = write
application.main()
"""


def test_sigterm_leaves_no_temporary_folder(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", _STOPPED_WHILE_WRITING], cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == application.TERMINATED == 143
    assert os.listdir(tmp_path) == []


def test_python_m_lmcompress_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "lmcompress", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("lmcompress ")
