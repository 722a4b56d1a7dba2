"""The command line: one file for each verb, which imports what it needs when it runs."""

from lmcompress.cli.application import app, main, run_app

__all__ = ["app", "main", "run_app"]
