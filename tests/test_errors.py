"""errors: one root, and help with misspelt names."""

import pytest

from lmcompress import CheckpointError, EquivalenceError, LmcompressError, UnknownFamilyError
from lmcompress.errors import argument, arguments_called, nearest


@pytest.mark.parametrize("kind", [CheckpointError, EquivalenceError, UnknownFamilyError])
def test_every_error_is_an_lmcompress_error_and_a_value_error(kind):
    assert issubclass(kind, LmcompressError) and issubclass(kind, ValueError)


def test_the_nearest_name_comes_first_and_all_names_after_it():
    assert nearest("temprature", ["weight", "temperature"]) == (
        "; did you mean 'temperature'? Valid are: temperature, weight"
    )


def test_a_name_like_no_other_gets_the_list_alone():
    assert nearest("zzz", ["weight", "temperature"]) == ". Valid are: temperature, weight"


def test_the_outermost_place_says_how_arguments_are_called():
    with arguments_called({"data": "--data", "splits": "a recipe's task.splits"}):
        with arguments_called({"data": "task.data"}):
            assert argument("data") == argument("data", "") == "--data"
        assert argument("splits", "{}") == "a recipe's task.splits: {}"
        assert argument("limit", "3") == "limit=3"
    assert argument("data", "") == "data="
