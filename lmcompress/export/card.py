"""The model card of an exported folder: what it is, what was measured, and code that runs it without torch."""

from __future__ import annotations

import json

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.export.causal import PAST, PRESENT, TextGeneration
from lmcompress.export.generation_card import ONNX_SESSION, generation_code
from lmcompress.export.heads import Head
from lmcompress.export.report import ExportReport
from lmcompress.export.sessions import RUNTIMES
from lmcompress.families.positions import positions_of

_PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
_LOAD = {
    "onnx": ("import onnxruntime", ONNX_SESSION),
    "openvino": ("import openvino", 'session = openvino.Core().compile_model("openvino_model.xml", "CPU")'),
}
_CALL = {
    "onnx": "outputs = dict(zip({names}, session.run({names}, inputs)))",
    "openvino": "outputs = dict(zip({names}, session(inputs).values()))",
}
_SATURATION = {
    "onnx": """
Processors without VNNI (before 2019) add the products of unsigned and signed bytes in 16 bits, where sums may saturate;
the session option `session.x64quantprecision` makes ONNX Runtime exact there, and changes nothing elsewhere.
""",
    "openvino": """
Processors without VNNI (before 2019) add the products of unsigned and signed bytes in 16 bits, where sums may saturate;
there, give `compile_model` the settings `{"LP_TRANSFORMS_MODE": False}` as a third argument: exact, and slower.
""",
}
_STATES = """* inputs: input_ids, `(batch, length)` int64; attention_mask, `(batch, past + length)` int64;
  beam_idx, `(batch)` int32: from which row of the last call each row goes on
* outputs: logits
* states: keys and values of earlier tokens; `reset_state()` of the request forgets them, before another text"""
_TEXTS = {
    "question_answering": '[("Who wrote it?", "It was written by Ada."), ("When?", "Nobody knows when.")]',
}
_ANSWERS = {
    "sequence_classification": 'print([labels[i] for i in outputs["logits"].argmax(-1)])',
    "token_classification": 'print([[labels[i] for i in row] for row in outputs["logits"].argmax(-1)])',
    "question_answering": 'print(outputs["start_logits"].argmax(-1), outputs["end_logits"].argmax(-1))',
    "masked_lm": 'print(outputs["logits"].shape)',
    "embeddings": 'print(outputs["{last}"].shape)',
}


def card(report: ExportReport, head: Head, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The card's text, with the Hub's metadata block.

    Args:
        report: what was measured.
        head: names inputs and outputs.
        model: its config has the labels.
        tokenizer: the tokenizer in the folder, if it is there as ``tokenizer.json``.
    """
    checked, name = report.comparison, RUNTIMES[report.to]
    metadata = ModelCardData(library_name=report.to, tags=["lmcompress", "model-compression", report.to]).to_yaml()
    answers = "" if checked.agreement is None else f", and {checked.agreement:.2%} of {checked.answers} answers equal"
    notes = "".join(f"* {note}\n" for note in report.notes)
    return f"""---
{metadata}
---

# A {type(model).__name__} for {name}

Exported by [lmcompress](https://github.com/lmcompress/lmcompress) with the codes, scales and ranges of the compressed
model. It needs neither lmcompress nor torch.

* task: {report.task}
{_interface(head)}
* activations: {report.activations}
* size: {report.bytes / 1e6:.2f} MB
* matmuls in integers: {report.products.integer} of {report.products.total}
* checked in {name}: relative error {checked.relative_error:.2g} of the outputs against those of the
  compressed model on {checked.batches} {checked.inputs} batches{answers}
{notes}
## Use

    pip install {_PACKAGES[report.to]} tokenizers numpy

```python
{code(report, head, model, tokenizer)}
```
{_SATURATION[report.to] if report.products.integer else ""}"""


def code(report: ExportReport, head: Head, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A program that runs the export in its folder, without torch.

    Args:
        report: names runtime and task.
        head: names inputs and outputs.
        model: its config has the labels.
        tokenizer: read from ``tokenizer.json``; None: the program has ids in place of texts.
    """
    if isinstance(head, TextGeneration):
        return generation_code(report.to, tokenizer, with_past=bool(head.layers), stateful=head.stateful)
    imports, load = _LOAD[report.to]
    lines = ["import json", "", "import numpy as np", imports]
    if tokenizer is not None:
        lines += ["from tokenizers import Tokenizer"]
    lines += ["", load]
    columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    if tokenizer is None:
        lines += ["ids = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])"]
        values = {"input_ids": "ids", "attention_mask": "np.ones_like(ids)", "token_type_ids": "np.zeros_like(ids)"}
    else:
        most = min(positions_of(model.config), 512)
        lines += ['tokenizer = Tokenizer.from_file("tokenizer.json")']
        if tokenizer.pad_token is not None:
            padding = f"pad_id={tokenizer.pad_token_id}, pad_token={json.dumps(str(tokenizer.pad_token))}"
            lines += [f"tokenizer.enable_padding({padding})"]
        texts = _TEXTS.get(report.task, '["It was a fine day.", "It rained."]')
        lines += [f"tokenizer.enable_truncation({most})", f"rows = tokenizer.encode_batch({texts})"]
        values = {name: f"np.array([row.{column} for row in rows])" for name, column in columns.items()}
    lines += ["inputs = {", *(f'    "{name}": {values[name]},' for name in head.inputs), "}"]
    lines += [_CALL[report.to].format(names=json.dumps(list(head.outputs)))]
    if "labels" in (answer := _ANSWERS.get(report.task, _ANSWERS["embeddings"])):
        lines += ['labels = {int(i): name for i, name in json.load(open("config.json"))["id2label"].items()}']
    lines += [answer.format(last=head.outputs[-1])]
    return "\n".join(lines if any("json." in line for line in lines) else lines[2:])


def _interface(head: Head) -> str:
    """Inputs and outputs in words."""
    if isinstance(head, TextGeneration) and head.stateful:
        return _STATES
    return f"* inputs: {_listed(head.inputs, ', each `(batch, length)` int64')}\n* outputs: {_listed(head.outputs)}"


def _listed(names: tuple[str, ...], about: str = "") -> str:
    """Names in words; those of keys and values are two for each layer."""
    cached = sum(name.startswith((f"{PAST}.", f"{PRESENT}.")) for name in names)
    own = ", ".join(names[: len(names) - cached]) + about
    return f"{own}, and {cached} of keys and values, `(batch, heads, length, head size)` float32" if cached else own
