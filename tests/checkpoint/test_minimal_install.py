"""What loading and serving needs: torch, transformers, safetensors, numpy and pydantic; of streams, zstandard too."""

import json
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lmcompress

NEEDED = ("torch", "transformers", "safetensors", "numpy", "pydantic")
ARTEFACTS = Path(__file__).parents[1] / "artefacts"
# what training, measuring, reporting and saving need: none of it is imported for loading
LEFT_OUT = ("datasets", "sklearn", "scipy", "matplotlib", "typer", "rich", "jinja2", "accelerate", "pandas", "yaml")

_LOAD = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
before = set(sys.modules)
import lmcompress
found = []
for folder in sys.argv[2:]:
    expected = json.load(open(folder + "/expected.json"))
    try:
        model = getattr(transformers, expected["class"]).from_pretrained(folder).eval()
        with torch.no_grad():
            mask = torch.tensor(expected["attention_mask"])
            logits = model(input_ids=torch.tensor(expected["input_ids"]), attention_mask=mask).logits.flatten(1)
        torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=0, atol=1e-5)
        found.append("loaded")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
ours = {name.partition(".")[0] for name, module in sys.modules.items() if name not in before}
lmcompress.CompressedModel(model).save_pretrained("again")
print(json.dumps([found, sorted(ours), lmcompress.__file__]))
"""


def _closure(names: tuple[str, ...]) -> dict[str, Distribution]:
    """The installed distributions of these names and of all that they require, extras left out."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # for another platform
        required = [Requirement(text) for text in found[name].requires or ()]
        waiting += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture
def minimal(tmp_path):
    """``minimal(names, folders)``: loads checkpoints where only these distributions and lmcompress are installed."""

    def run(names, folders):
        site = tmp_path / "site-packages"
        site.mkdir()
        (site / "lmcompress").symlink_to(Path(lmcompress.__file__).parent)
        for one in _closure(names).values():
            for top in {file.parts[0] for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}:
                if not (site / top).exists():
                    (site / top).symlink_to(one.locate_file(top))
        # -I -S: neither the environment's own packages nor its variables
        command = [sys.executable, "-I", "-S", "-c", _LOAD, str(site), *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        found, ours, file = json.loads(done.stdout.splitlines()[-1])
        assert Path(file).is_relative_to(site)
        return found, ours

    return run


def test_packed_pruned_and_compact_checkpoints_load_without_what_training_needs(minimal):
    folders = [ARTEFACTS / name for name in ("v1/bert", "v3/bert-8", "v3/bert-attention", "v4/bert", "v4/gpt2-compact")]
    found, ours = minimal(NEEDED, [*folders, ARTEFACTS / "v4/gpt2-streams"])
    assert found[:-1] == ["loaded"] * len(folders)
    assert "need the package zstandard: pip install zstandard" in found[-1]
    assert not set(ours) & {*LEFT_OUT, "zstandard"}


def test_streams_need_zstandard_besides(minimal):
    found, ours = minimal((*NEEDED, "zstandard"), [ARTEFACTS / "v4/gpt2-streams", ARTEFACTS / "v4/bert-streams"])
    assert found == ["loaded"] * 2
    assert not set(ours) & set(LEFT_OUT)
