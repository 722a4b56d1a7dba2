"""What each client does with a checkpoint: code that a user would write, and the numbers that it gives.

A driver takes a folder (or, for the numbers to compare with, a model in memory), and returns JSON. As a program, this
module runs drivers where lmcompress cannot be imported: requests on standard input, a line each, answers on standard
output.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from typing import Any

PROMPTS = ["the cat sat on the", "a dog and"]
SENTENCES = ["the cat sat on the mat", "a dog ran", "the bird and the dog sat on a hat in the sun"]


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _model(source: Any, auto: str, **options: Any) -> Any:
    import transformers

    if not isinstance(source, str):
        return source
    return getattr(transformers, auto).from_pretrained(source, **options)


def pipelines(classifier: Any, decoder: Any, folders: list[str], **options: Any) -> Any:
    """Classes with their scores, features, and generated text."""
    from transformers import pipeline

    of_classifier, of_decoder = _tokenizer(folders[0]), _tokenizer(folders[1])
    classes = pipeline("text-classification", model=classifier, tokenizer=of_classifier, top_k=None, **options)
    texts = pipeline("text-generation", model=decoder, tokenizer=of_decoder, **options)
    made = texts(PROMPTS, max_new_tokens=6, do_sample=False)
    return {
        "classes": [
            [row["score"] for row in sorted(rows, key=lambda row: row["label"])] for rows in classes(SENTENCES)
        ],
        "texts": [rows[0]["generated_text"] for rows in made],
    }


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "assisted": {},
    "static cache": {"cache_implementation": "static"},
}


def generate(source: Any, how: str, folder: str, assistant: str, **options: Any) -> Any:
    """The tokens that ``generate`` gives after two prompts of unequal length."""
    import torch

    model = _model(source, "AutoModelForCausalLM", **options)
    tokenizer = _tokenizer(folder)
    tokenizer.padding_side = "left"
    prompts = PROMPTS[:1] if how == "assisted" else PROMPTS
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    more = dict(GENERATION[how])
    if how == "assisted":
        more["assistant_model"] = _model(assistant, "AutoModelForCausalLM", **options)
    torch.manual_seed(7)
    settings = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10} | more
    tokens = model.generate(**inputs, **settings)
    return tokens.tolist()


def continuous(source: Any, folder: str, **options: Any) -> Any:
    """The tokens that ``generate_batch`` gives."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _model(source, "AutoModelForCausalLM", **options)
    # by default the cache takes most of the memory that is free, and two tests run at once
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    tokenizer = _tokenizer(folder)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=tokenizer.pad_token_id)
    rows = [tokenizer(text)["input_ids"] for text in PROMPTS]
    found = model.generate_batch(inputs=rows, generation_config=config, continuous_batching_config=small)
    return [output.generated_tokens for output in found.values()]


def lm_eval(source: Any, folder: str, **options: Any) -> Any:
    """The log-likelihoods and measures of a task of our own: choices, and the perplexity of texts."""
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    answers = ["mat", "dog and a cat", "sun"]
    rows = Dataset.from_list([{"text": text, "choices": answers, "label": i % 3} for i, text in enumerate(SENTENCES)])
    common = {"custom_dataset": lambda **_: {"test": rows}, "test_split": "test"}
    choices = common | {
        "task": "tiny_choices",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    texts = common | {
        "task": "tiny_texts",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    more = {"tokenizer": _tokenizer(folder)} if not isinstance(source, str) else {}
    model = HFLM(pretrained=source, device="cpu", batch_size=2, **more, **options)
    # without an index of the thirteen thousand tasks that come with it
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(model, tasks=[choices, texts], bootstrap_iters=0, task_manager=manager)
    samples = sorted(found["samples"]["tiny_choices"], key=lambda sample: sample["doc_id"])
    return {
        "log-likelihoods": [[choice[0][0] for choice in sample["resps"]] for sample in samples],
        "accuracy": found["results"]["tiny_choices"]["acc,none"],
        "perplexity": found["results"]["tiny_texts"]["word_perplexity,none"],
    }


def sentences(folder: str, saved: str | None, **options: Any) -> Any:
    """Embeddings of a model with ``modules.json``, or of the same saved again by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", **options)
    if saved is not None:
        model.save_pretrained(saved)
        model = SentenceTransformer(saved, device="cpu", **options)
    return model.encode(SENTENCES).tolist()


def dispatched(folder: str, auto: str, inputs: dict[str, Any], **options: Any) -> Any:
    """Logits of a model whose skeleton accelerate filled, which lmcompress made where it is installed."""
    import torch
    import transformers
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, **options)
    with init_empty_weights():
        if options:
            empty = getattr(transformers, auto).from_config(config, **options)
        else:
            import lmcompress

            empty = lmcompress.model_from_config(config, getattr(transformers, auto))
    empty.tie_weights()
    filled = load_checkpoint_and_dispatch(empty, folder, device_map={"": "cpu"}).eval()
    batch = {name: torch.tensor(values) for name, values in inputs.items()}
    with torch.no_grad():
        return [filled(**batch).logits.tolist()]


def mapped(folder: str, auto: str, inputs: dict[str, Any], **options: Any) -> Any:
    """Logits of a model loaded with a ``device_map``."""
    import torch

    batch = {name: torch.tensor(values) for name, values in inputs.items()}
    found = [_model(folder, auto, device_map=where, **options) for where in ("cpu", "auto", {"": "cpu"})]
    with torch.no_grad():
        return [model(**batch).logits.tolist() for model in found]


def lora(source: Any, saved: str, auto: str, targets: list[str], inputs: dict[str, Any], **options: Any) -> Any:
    """Losses while an adapter is trained, and the logits with it: as trained, saved and loaded again, and merged."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    task = "CAUSAL_LM" if "Causal" in auto else "SEQ_CLS"
    model = _model(source, auto, **options)
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(task_type=task, r=4, target_modules=targets))
    batch = {name: torch.tensor(values) for name, values in inputs.items()}
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(3):
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    adapted.eval()
    adapted.save_pretrained(saved)
    with torch.no_grad():
        trained = adapted(**batch).logits
        again = trained
        if isinstance(source, str):
            again = PeftModel.from_pretrained(_model(source, auto, **options), saved).eval()(**batch).logits
        merged = adapted.merge_and_unload()(**batch).logits
    return {"losses": losses, "trained": trained.tolist(), "again": again.tolist(), "merged": merged.tolist()}


def onnx(source: Any, auto: str, inputs: dict[str, Any], file: str, dynamo: bool, **options: Any) -> Any:
    """Logits of ONNX Runtime for a model exported by ``torch.onnx.export``."""
    import onnxruntime
    import torch

    model, batch = _plain(_model(source, auto, **options)), {name: torch.tensor(v) for name, v in inputs.items()}
    named = {"input_names": list(batch), "output_names": ["logits"]}
    with warnings.catch_warnings(), torch.no_grad():
        # deprecations of torch.onnx itself, and notes of the tracer on the code of transformers
        warnings.simplefilter("ignore")
        torch.onnx.export(_Logits()(model), tuple(batch.values()), file, dynamo=dynamo, verbose=False, **named)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})[0].tolist()


def openvino(source: Any, auto: str, inputs: dict[str, Any], **options: Any) -> Any:
    """Logits of OpenVINO, in float32, for a model converted by ``openvino.convert_model``."""
    import openvino as ov
    import torch

    model, batch = _plain(_model(source, auto, **options)), {name: torch.tensor(v) for name, v in inputs.items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        converted = ov.convert_model(_Logits()(model), example_input=tuple(batch.values()))
    compiled = ov.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(list(tensor.numpy() for tensor in batch.values()))[0].tolist()


def _plain(model: Any) -> Any:
    model.config.use_cache = False
    return model.eval()


class _Logits:
    """Wraps a model so that ids and mask go in and logits come out, as for any export by hand."""

    def __call__(self, model: Any) -> Any:
        import torch

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, input_ids: Any, attention_mask: Any) -> Any:
                return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

        return Logits().eval()


class _Blocked:
    """Makes a package impossible to import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "lmcompress":
            raise ModuleNotFoundError("lmcompress is not installed here")


def without_lmcompress() -> None:
    """From here on, lmcompress cannot be imported, as if it were not installed."""
    # torch would import an installed one by its entry point
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    sys.meta_path.insert(0, _Blocked())  # type: ignore[arg-type]


def _answer() -> None:
    """Each request in a process of its own, in which no checkpoint has brought its loader yet."""
    # what libraries print goes to standard error
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    without_lmcompress()
    # once for all requests
    for module in ("transformers.quantizers.auto", "transformers.pipelines", "transformers.generation"):
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            print(json.dumps(_answer_to(json.loads(line))), file=answers, flush=True)
            os._exit(0)
        os.waitpid(child, 0)


def _answer_to(asked: Any) -> Any:
    try:
        return {"value": globals()[asked["driver"]](*asked["args"], **asked["options"])}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    _answer()
