"""The part of a card that shows how a causal model generates text in its runtime alone."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

ONNX_SESSION = """options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")
session = onnxruntime.InferenceSession("model.onnx", options)"""
"""The lines that load a graph in ONNX Runtime, exact on processors without VNNI too."""

_ONNX_PAST = """past = {
    one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
    for one in session.get_inputs()
    if one.name.startswith("past_key_values.")
}"""
_OPENVINO_PAST = """past = {
    one.any_name: np.zeros((1, one.partial_shape[1].get_length(), 0, one.partial_shape[3].get_length()), np.float32)
    for one in session.inputs
    if one.any_name.startswith("past_key_values.")
}"""
_LOAD = {
    "onnx": f"""{ONNX_SESSION}
names = [one.name for one in session.get_outputs()]""",
    "openvino": """session = openvino.Core().compile_model("openvino_model.xml", "CPU")
names = [one.any_name for one in session.outputs]""",
    "stateful": """model = openvino.Core().compile_model("openvino_model.xml", "CPU")
session = model.create_infer_request()""",
}
_RUN = {
    "onnx": "outputs = dict(zip(names, session.run(names, inputs)))",
    "openvino": "outputs = dict(zip(names, session(inputs).values()))",
    "stateful": 'outputs = {"logits": session.infer(inputs | {"beam_idx": np.zeros(1, np.int32)})["logits"]}',
}
_KEEP = 'past = {name: outputs[name.replace("past_key_values", "present")] for name in past}'


def generation_code(to: str, tokenizer: PreTrainedTokenizerBase | None, *, with_past: bool, stateful: bool) -> str:
    """A program that generates text greedily, without torch.

    Args:
        to: the runtime, ``"onnx"`` or ``"openvino"``.
        tokenizer: None: the program has ids in place of text.
        with_past: whether keys and values of earlier tokens are inputs and outputs, or states.
        stateful: whether they are states.
    """
    kind = "stateful" if stateful else to
    text = tokenizer is not None
    lines = ["import numpy as np", f"import {'onnxruntime' if to == 'onnx' else 'openvino'}"]
    lines += ["from tokenizers import Tokenizer"] if text else []
    lines += ["", _LOAD[kind]]
    if with_past and not stateful:
        lines += [_ONNX_PAST if to == "onnx" else _OPENVINO_PAST]
    lines += ['tokenizer = Tokenizer.from_file("tokenizer.json")'] if text else []
    lines += [
        'ids = np.array([tokenizer.encode("It was a fine day").ids])' if text else "ids = np.array([[5, 6, 7, 8]])"
    ]
    lines += ["new = ids", "for _ in range(20):"]
    given = '{"input_ids": ' + ("new" if with_past else "ids") + ', "attention_mask": np.ones_like(ids)}'
    lines += [f"    inputs = {given}{' | past' if with_past and not stateful else ''}", f"    {_RUN[kind]}"]
    lines += ['    new = outputs["logits"][:, -1:].argmax(-1)', "    ids = np.concatenate([ids, new], axis=1)"]
    lines += [f"    {_KEEP}"] if with_past and not stateful else []
    return "\n".join([*lines, "print(tokenizer.decode(ids[0]))" if text else "print(ids)"])
