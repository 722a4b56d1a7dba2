"""The page of the contract's matrix is made of the values that the tests committed."""

import json

import contract


def test_the_page_is_that_of_the_table():
    table = json.loads(contract.TABLE.read_text("utf-8"))
    assert contract.PAGE.read_text("utf-8") == contract.page(table)
    assert len(table) >= 12 and all(len(cells) == 5 for cells in table.values())
