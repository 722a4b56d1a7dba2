"""The command line: one file for each verb, which imports what it needs when it runs."""

from lmcompress.cli.application import app, main, run_app
from lmcompress.cli.console import auto_class_name

__all__ = ["app", "auto_class_name", "main", "run_app"]
