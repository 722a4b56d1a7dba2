"""What ``__all__`` promises can be imported, and what the package shows is promised."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import lmcompress
from lmcompress.checkpoint.cutting import keep_heads

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
    assert sorted(lmcompress.__all__) == dir(lmcompress)
    itself = {"Any", "MetaPathFinder", "ModuleSpec", "ModuleType", "PathFinder", "Sequence", "TYPE_CHECKING"}
    # autoload is what the entry point of torch calls
    itself |= {"annotations", "autoload", "importlib", "sys"}
    submodules = {name.split(".")[1] for name in MODULES}
    public = {name for name in vars(lmcompress) if not name.startswith("_")} - submodules - itself
    assert public <= set(lmcompress.__all__)


def test_what_is_imported_on_first_use_is_what_its_module_has():
    assert lmcompress._LAZY.keys() <= set(lmcompress.__all__)
    for name, module in lmcompress._LAZY.items():
        assert getattr(lmcompress, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="module 'lmcompress' has no attribute 'nothing'"):
        lmcompress.nothing  # noqa: B018


def _python(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_importing_the_package_imports_neither_torch_nor_transformers():
    done = _python("import lmcompress, sys; sys.exit(str({'torch', 'transformers', 'numpy'} & sys.modules.keys()))")
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize(
    "imports",
    [
        "import lmcompress, transformers",
        "import transformers, lmcompress",
        "from transformers import BertForSequenceClassification; import lmcompress",
        "import lmcompress; from transformers import BertForSequenceClassification",
        "import lmcompress.errors",
        "from lmcompress import CompressedModel",
    ],
)
def test_importing_the_package_is_all_that_loading_needs(imports, make_model, tmp_path):
    model = make_model("bert")
    keep_heads(lmcompress.anatomy_of(model).blocks[0], [1])
    lmcompress.CompressedModel(model).save_pretrained(tmp_path / "m")
    done = _python(
        f"{imports}\nfrom transformers import AutoModelForSequenceClassification as Auto\n"
        f"print(Auto.from_pretrained({str(tmp_path / 'm')!r}).config.quantization_config.structure.blocks[0].heads)"
    )
    assert done.stdout.strip() == "1", done.stderr


def test_all_is_sorted():
    assert sorted(lmcompress.__all__) == list(lmcompress.__all__)
