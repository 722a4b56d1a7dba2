"""What ``__all__`` promises can be imported, and what the package shows is promised."""

import importlib
import pkgutil

import pytest

import lmcompress

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lmcompress.__path__, "lmcompress.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", ["lmcompress", *MODULES])
def test_every_name_in_all_can_be_imported(name):
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    assert [name for name in exported if not hasattr(module, name)] == []


def test_the_package_lists_all_its_public_names():
    submodules = {name.split(".")[1] for name in MODULES}
    public = {name for name in vars(lmcompress) if not name.startswith("_")} - submodules - {"register"}
    assert public == set(lmcompress.__all__) - {"__version__"}


def test_all_is_sorted():
    assert sorted(lmcompress.__all__) == list(lmcompress.__all__)
