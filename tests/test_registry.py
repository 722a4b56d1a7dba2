"""Parts by name, and parts from a user's own module."""

import sys

import pytest

from lmcompress.errors import LmcompressError
from lmcompress.registry import Registry, imported


@pytest.fixture
def ramps():
    return Registry("ramp", {"linear": abs, "cubic": pow}, callable, "a function of the progress")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of a user's, in the folder that the command is run from."""
    (tmp_path / "my_ramps.py").write_text("def slow(progress):\n    return progress**9\n\nNUMBER = 3\n")
    monkeypatch.chdir(tmp_path)
    yield "my_ramps"
    sys.modules.pop("my_ramps", None)


def test_a_registry_is_the_mapping_of_its_built_in_parts(ramps):
    assert dict(ramps) == {"linear": abs, "cubic": pow}
    assert len(ramps) == 2 and "linear" in ramps


def test_names_and_objects_resolve_to_parts(ramps, own):
    assert ramps.resolve("linear") is abs
    assert ramps.resolve(max) is max
    assert ramps.resolve(f"{own}:slow")(0.5) == 0.5**9


def test_importing_a_custom_part_leaves_the_path_as_it_was(ramps, own):
    before = list(sys.path)
    ramps.resolve(f"{own}:slow")
    assert sys.path == before


def test_a_part_has_the_name_that_finds_it_again(ramps, own):
    slow = ramps.resolve(f"{own}:slow")
    assert ramps.resolve(ramps.name_of(slow)) is slow
    assert ramps.name_of(slow) == f"{own}:slow"
    assert ramps.name_of(abs) == "linear"
    assert ramps.name_of("anything") == "anything"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("linaer", r"unknown ramp 'linaer'; did you mean 'linear'\? .*a custom one is named module:attribute"),
        (
            "no_such_module:x",
            r"ramp 'no_such_module:x': cannot import 'no_such_module' \(ModuleNotFoundError.*installed",
        ),
        ("my_ramps:slwo", r"my_ramps has no 'slwo'; did you mean 'slow'\?"),
        ("my_ramps:NUMBER", r"ramp my_ramps:NUMBER: must be a function of the progress, got int"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_clear_error(ramps, own, name, message):
    with pytest.raises(LmcompressError, match=message):
        ramps.resolve(name)


def test_an_object_of_another_kind_is_refused(ramps):
    with pytest.raises(LmcompressError, match="must be a function of the progress, got int"):
        ramps.resolve(3)


def test_a_part_made_in_a_function_has_no_name_to_save(ramps):
    with pytest.raises(LmcompressError, match="has no name to save: assign it to a variable of a module"):
        ramps.name_of(lambda progress: progress)


def test_a_module_that_exits_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "leaves_early.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LmcompressError, match="cannot import 'leaves_early' \\(SystemExit: 3\\)"):
        imported("leaves_early:part", "criterion")


@pytest.mark.parametrize("name", ["os:", ":path", "..os:path", "os:a.b", "a b:c"])
def test_a_name_must_be_one_of_a_module_and_one_of_an_attribute(name):
    with pytest.raises(LmcompressError, match="must be written module:attribute"):
        imported(name, "criterion")


def test_of_very_many_names_fifty_are_listed():
    with pytest.raises(LmcompressError, match=r"os has no 'nosuch'.* … and \d\d+ more"):
        imported("os:nosuch", "criterion")
