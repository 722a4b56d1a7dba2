"""The table of clients is that of the tests."""

from __future__ import annotations

import clients
from client_forms import FORMS
from client_table import TABLE


def test_the_page_has_the_table_that_the_tests_declare():
    assert clients.page() == clients.PAGE.read_text("utf-8"), "run python tools/clients.py"


def test_every_client_has_a_test_for_every_form():
    clients.table()
    assert TABLE and all(cells.keys() == FORMS.keys() for cells in TABLE.values())
