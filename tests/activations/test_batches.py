"""Calibration data in any of the usual forms: one function for all verbs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from families import make
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from lmcompress import LmcompressError
from lmcompress.activations.batches import as_batches
from lmcompress.activations.calibration import CalibrationData
from lmcompress.clustering import SharingConfig, share_weights
from lmcompress.pruning import PruningConfig, prune
from lmcompress.pruning.structured.scoring import score
from lmcompress.pruning.structured.sensitivity import mean_loss, sensitivity
from lmcompress.pruning.unstructured import SparsityConfig, prune_weights
from lmcompress.pruning.unstructured.sensitivity import sensitivity_scan
from lmcompress.quantization import QuantizationConfig, quantize
from lmcompress.quantization.mixed import bits_sensitivity
from lmcompress.students import factorize

LENGTHS = (5, 9, 3, 7, 2, 6, 8, 4, 5, 9)


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(2, 60, (length,), generator=generator).tolist() for length in LENGTHS]
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": i % 3, "text": "dropped"}
        for i, ids in enumerate(made)
    ]


def padded(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in some)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in some]),
        "attention_mask": torch.tensor(
            [row["attention_mask"] + [0] * (longest - len(row["input_ids"])) for row in some]
        ),
        "labels": torch.tensor([row["labels"] for row in some]),
    }


class Indexed:
    """A data set of torch without ``__iter__``."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(value) for name, value in rows()[index].items() if name != "text"}


whole = padded(rows())
FORMS: dict[str, Any] = {
    "batches": [whole],
    "generator": (batch for batch in [whole]),
    "one batch": whole,
    "encoding": BatchEncoding(whole),
    "lists": BatchEncoding({name: [row[name] for row in rows()] for name in rows()[0]}),
    "arrays": [{name: value.numpy() for name, value in whole.items()}],
    "loader": DataLoader([{k: v for k, v in row.items() if k != "text"} for row in rows()], 3, collate_fn=padded),
    "dataset": Dataset.from_list(rows()),
    "dataset of tensors": Dataset.from_list(rows()).with_format("torch"),
    "stream": Dataset.from_list(rows()).to_iterable_dataset(),
    "rows": rows(),
    "indexed": Indexed(),
    "without mask": Dataset.from_list(rows()).remove_columns("attention_mask"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_rows(form):
    batches = as_batches(FORMS[form] if form != "generator" else (batch for batch in [whole]))
    found = [
        (ids[mask.bool()].tolist(), int(label))
        for batch in batches
        for ids, mask, label in zip(
            *(torch.as_tensor(batch[name]) for name in ("input_ids", "attention_mask", "labels")), strict=True
        )
    ]
    assert found == [(row["input_ids"], row["labels"]) for row in rows()]
    assert all(isinstance(value, torch.Tensor) for batch in batches for value in batch.values())


def test_batches_of_tensors_are_not_copied():
    assert as_batches([whole])[0] is whole and as_batches([]) == []


def test_labels_of_tokens_are_padded_with_what_does_not_count():
    data = [{"input_ids": [3, 4], "labels": [1, 2]}, {"input_ids": [5], "labels": [2]}]
    (batch,) = as_batches(data)
    assert batch["labels"].tolist() == [[1, 2], [2, -100]] and batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_rows_of_several_choices_are_padded_on_the_right():
    data = Dataset.from_list([{"input_ids": [[1, 2, 3], [4, 5, 6]], "label": 0}, {"input_ids": [[7], [8]], "label": 1}])
    (batch,) = as_batches(data)
    assert batch["input_ids"].tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 0, 0], [8, 0, 0]]]


PRUNING = PruningConfig(target={"sparsity": 0.3}, parts=("heads", "neurons"), criterion="taylor_gates")
VERBS = {
    "prune": lambda model, data: prune(model, PRUNING, data),
    "quantize": lambda model, data: quantize(model, batches=data, method="gptq", progress=False),
    "prune_weights": lambda model, data: prune_weights(model, SparsityConfig(sparsity=0.5, criterion="wanda"), data),
    "share_weights": lambda model, data: share_weights(model, SharingConfig(clusters=4, sensitivity=True), data),
    "score": lambda model, data: score(model, "fisher", ["heads"], data),
    "sensitivity": lambda model, data: sensitivity(
        model, score(model, "l1", ["heads"]), mean_loss(data), shares=(0.5,)
    ),
    "sensitivity_scan": lambda model, data: sensitivity_scan(
        model, lambda _: 0.0, (0.5,), config=SparsityConfig(sparsity=0.5, criterion="wanda"), batches=data
    ),
    "bits_sensitivity": lambda model, data: bits_sensitivity(model, QuantizationConfig(), data, bits=(4,)),
    "factorize": lambda model, data: factorize(model, rank=4, activations=data),
}


@pytest.mark.parametrize("form", ["one batch", "loader", "dataset"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_every_form(verb, form):
    model, other = make("bert"), make("bert")
    VERBS[verb](model, FORMS[form])
    if form == "one batch":
        VERBS[verb](other, [whole])
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )


BARE = {
    "tensor": (torch.ones(2, 3, dtype=torch.long), r"a tensor \(2, 3\): pass \{'input_ids': tensor"),
    "list of tensors": ([torch.ones(2, 3, dtype=torch.long)], r"list of a tensor \(2, 3\)"),
    "loader of tensors": (DataLoader(TensorDataset(torch.ones(2, 3))), "DataLoader of list"),
    "text": ("a text", "text: tokenize it first"),
    "texts": (["a text"], "list of text: tokenize it first"),
    "dataset of text": (Dataset.from_list([{"text": "a"}]), "rows of text: tokenize them first"),
    "data sets": (DatasetDict({"train": Dataset.from_list(rows())}), r"data sets by name \(train\): pass one of them"),
    "number": (7, "got int"),
    "array": (np.ones((2, 3)), "got ndarray of ndarray"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_bare_tensors_are_refused_with_what_is_expected(verb):
    model = make("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(LmcompressError, match="batches must be a list of batches, each .*got list of a tensor"):
        VERBS[verb](model, BARE["list of tensors"][0])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", BARE)
def test_the_message_says_what_came(kind):
    given, message = BARE[kind]
    with pytest.raises(LmcompressError, match=f"batches must be .*{message}"):
        as_batches(given)


def test_no_data_and_only_padding_are_refused():
    model = make("bert")
    with pytest.raises(LmcompressError, match="at least one batch"):
        list(CalibrationData(model, []))
    with pytest.raises(LmcompressError, match="got 1 batches of padding only"):
        list(CalibrationData(model, whole | {"attention_mask": torch.zeros_like(whole["input_ids"])}))
