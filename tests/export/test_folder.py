"""An exported folder stands alone: the code of its card runs in a process that has neither torch nor lmcompress."""

import re
import subprocess
import sys

import pytest
from exported import STATIC, batches, packed
from families import make

from lmcompress.data import train_tokenizer
from lmcompress.export import export_model

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["It was a fine day.", "It rained.", "Who wrote it?", "It was written by Ada.", "Nobody knows when."]
_BLOCK = """
import sys
for name in ("torch", "transformers", "lmcompress"):
    sys.modules[name] = None
"""


@pytest.mark.parametrize(
    ("to", "head", "settings", "printed"),
    [
        ("onnx", "classification", {}, r"\['LABEL_\d', 'LABEL_\d'\]"),
        pytest.param("openvino", "classification", {}, r"\['LABEL_\d', 'LABEL_\d'\]", marks=pytest.mark.slow),
        pytest.param("onnx", "tokens", {}, r"\[\['LABEL_\d'.*\]\]", marks=pytest.mark.slow),
        pytest.param(
            "openvino", "classification", {"task": "embeddings", "pooling": "mean"}, r"\(2, 16\)",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_the_code_of_the_card_runs_without_torch(to, head, settings, printed, tmp_path):
    tokenizer = train_tokenizer(TEXTS, kind="wordpiece", vocab_size=60)
    model = packed(make("bert", head), STATIC)
    export_model(model, tmp_path / "out", to=to, batches=batches(model), tokenizer=tokenizer, **settings)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    done = subprocess.run(
        [sys.executable, "-c", _BLOCK + code], cwd=tmp_path / "out", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(printed, done.stdout.strip()), done.stdout
