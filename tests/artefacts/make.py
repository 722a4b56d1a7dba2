"""Writes the checkpoints of one format version, to be reloaded by every later one: ``python tests/artefacts/make.py``.

Run once for each new format version, and never again for an old one: an artefact is worth something only because it was
written by the code of its time. An existing version is not overwritten.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from compacting import compact_causal, compact_uneven, shared_uneven  # noqa: E402
from families import cut_to_nothing, cut_unevenly, make, sparse  # noqa: E402
from packing import INPUTS, packed, packed_with_attention  # noqa: E402

from lmcompress import CompressedModel  # noqa: E402
from lmcompress.checkpoint.config import FORMAT_VERSION  # noqa: E402
from lmcompress.checkpoint.schema import Provenance  # noqa: E402
from lmcompress.entropy_coding import Coder  # noqa: E402
from lmcompress.kernels.dispatch import using  # noqa: E402
from lmcompress.numerics.grids import PerGroup, PerRow  # noqa: E402

MODELS = {
    "bert": ("bert", "classification", cut_unevenly),
    "electra": ("electra", "language", cut_to_nothing),
    "gpt2": ("gpt2", "language", cut_to_nothing),
    # 8 bits with a static range of inputs; 4 bits by groups; ternary with a tied head; 3 bits with zero points
    "bert-8": ("bert", "classification", lambda m: packed(cut_unevenly(m), "minmax", 8, inputs="static asymmetric")),
    "bert-attention": (
        "bert",
        "language",
        lambda m: packed_with_attention(cut_unevenly(m), INPUTS["static asymmetric"]),
    ),
    "roberta-4": ("roberta", "language", lambda m: packed(cut_unevenly(m), "minmax", 4, granularity=PerGroup(1))),
    "gpt2-ternary": ("gpt2", "language", lambda m: packed(cut_to_nothing(m), "twn", "ternary", inputs="token")),
    "distilbert-3": (
        "distilbert",
        "classification",
        lambda m: packed(cut_unevenly(m), "asymmetric_minmax", 3, granularity=PerRow(), inputs="asymmetric"),
    ),
    # factors, groups and a tied factorised head; local mixing with a cache; shared blocks
    "bert-compact": ("bert", "language", lambda m: compact_uneven(cut_unevenly(m))),
    "gpt2-compact": ("gpt2", "language", lambda m: compact_causal(cut_to_nothing(m))),
    "distilbert-shared": ("distilbert", "classification", shared_uneven),
    # grouped queries, rotary positions and a gate: dense, and of 8 bits
    "llama": ("llama", "language", cut_to_nothing),
    "llama-8": ("llama", "language", lambda m: packed(cut_unevenly(m), "minmax", 8, inputs="token")),
    # streams: a tied head, cut blocks
    "gpt2-streams": ("gpt2", "language", lambda m: sparse(cut_to_nothing(m))),
    "bert-streams": ("bert", "classification", lambda m: sparse(cut_unevenly(m))),
}
STORAGE: dict[str, Coder] = {"gpt2-streams": "auto", "bert-streams": "huffman"}
INPUT_IDS = [[5, 9, 2, 33, 60, 17, 4, 8], [7, 7, 21, 3, 50, 11, 1, 1]]
ATTENTION_MASK = [[1] * 8, [1] * 6 + [0] * 2]


def write(target: Path) -> None:
    """Make all models of this version below ``target``.

    Args:
        target: a folder that is not there yet.
    """
    if target.exists():
        raise SystemExit(f"{target} is there already; artefacts of a version are written once and kept for ever")
    for name, (family, head, shape) in MODELS.items():
        model = shape(make(family, head, seed=1))
        provenance = Provenance(
            base_model="tiny-random", recipe="artefact", methods=("pruning",), library_version="0.1.0"
        )
        CompressedModel(model, provenance).save_pretrained(target / name, storage=STORAGE.get(name, "plain"))
        for unused in ("README.md", "lmcompress.json"):
            (target / name / unused).unlink()
        # what it multiplies is the same on every machine
        with torch.no_grad(), using(kernel="reference"):
            logits = model(input_ids=torch.tensor(INPUT_IDS), attention_mask=torch.tensor(ATTENTION_MASK)).logits
        expected = {
            "class": type(model).__name__,
            "input_ids": INPUT_IDS,
            "attention_mask": ATTENTION_MASK,
            "logits": [[round(x, 6) for x in row] for row in logits.flatten(1).tolist()],
        }
        (target / name / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    folder = HERE / f"v{FORMAT_VERSION}"
    write(folder)
    print(f"wrote {folder}")
