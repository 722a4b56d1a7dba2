"""The scripts of benchmarks/, as their own command lines import them."""

import importlib
import sys

import pytest
from doc_pages import ROOT


def _script(name):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="session")
def tables():
    return _script("tables")


@pytest.fixture(scope="session")
def picture():
    return _script("picture")
