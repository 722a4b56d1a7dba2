"""Exported causal models in their runtimes: what they generate, and what they refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from decoders import DECODERS, decoder
from families import cut_to_nothing, cut_unevenly, make
from packing import INPUTS, packed
from transformers import DynamicCache, StaticCache

from lmcompress.errors import LmcompressError
from lmcompress.evaluation import perplexity
from lmcompress.export import export_model, is_exported, load_exported
from lmcompress.export.generation import StateCache
from lmcompress.families.positions import first_position
from lmcompress.numerics.grids import PerRow

pytestmark = pytest.mark.filterwarnings("ignore")

RUNTIMES = ("onnx", "openvino")
HOW = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams, sampling": {"num_beams": 2, "do_sample": True},
    "without a cache": {"use_cache": False},
    "in chunks": {"prefill_chunk_size": 2},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
}
PLAIN = dict(max_new_tokens=8, pad_token_id=1, eos_token_id=None)


def compressed(inputs="static"):
    """Unevenly cut, a block without heads, everything in 8 bits, head and embedding one matrix."""
    return packed(cut_to_nothing(make("gpt2", "language")), inputs=inputs, granularity=PerRow())


@pytest.fixture(scope="module")
def model():
    return compressed()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    for library in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(library)
    place = tmp_path_factory.mktemp("exported")
    reports = {to: export_model(model, place / to, to=to) for to in RUNTIMES}
    return {to: (place / to, reports[to]) for to in RUNTIMES}


@pytest.fixture(scope="module", params=RUNTIMES)
def exported(request, folders):
    folder, _ = folders[request.param]
    return load_exported(folder, threads=1, precision="f32" if request.param == "openvino" else None)


def ragged():
    ids = torch.randint(2, 60, (3, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3], ids[1, :3] = 0, 1
    return ids, mask


@torch.no_grad()
def continued(model, ids, count=8):
    """The likeliest tokens by the forward pass of a model, which counts positions itself."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def generated(model, ids, mask, **how):
    torch.manual_seed(5)
    found = model.generate(ids, attention_mask=mask, **PLAIN, **how)
    return found if isinstance(found, torch.Tensor) else found.sequences


@pytest.mark.parametrize("to", RUNTIMES)
def test_all_matmuls_are_integer_and_the_tied_matrix_is_stored_once(to, folders):
    folder, report = folders[to]
    assert report.products.integer == report.products.total > 0
    assert report.comparison.relative_error < 1e-3 and report.comparison.agreement == 1.0
    tables = {tuple(shape) for shape in ((64, 13), (13, 64))}
    assert is_exported(folder) and sum(shape in tables for shape in _bytes_of_matrices(folder, to)) == 1


def _bytes_of_matrices(folder, to):
    if to == "onnx":
        import onnx

        graph = onnx.load(folder / "model.onnx").graph
        return [tuple(one.dims) for one in graph.initializer if one.data_type == onnx.TensorProto.INT8]
    import openvino

    nodes = openvino.Core().read_model(folder / "openvino_model.xml").get_ops()
    kinds = [node for node in nodes if node.get_type_name() == "Constant"]
    return [tuple(one.get_output_shape(0)) for one in kinds if one.get_element_type() == openvino.Type.i8]


@pytest.mark.parametrize("how", HOW)
def test_it_generates_what_the_packed_model_generates(how, exported, model):
    ids, mask = ragged()
    assert torch.equal(generated(exported, ids, mask, **HOW[how]), generated(model, ids, mask, **HOW[how]))


def test_a_row_of_a_ragged_batch_gets_what_it_gets_alone(exported):
    ids, mask = ragged()
    together = generated(exported, ids, mask)
    for row, keep, tokens in zip(ids, mask.bool(), together, strict=True):
        alone = generated(exported, row[keep][None], mask[:1, : int(keep.sum())])
        assert torch.equal(tokens[-8:], alone[0, -8:])


def test_a_draft_of_another_model_changes_nothing(exported, model):
    ids, mask = ragged()
    plain = generated(exported, ids[:1], mask[:1])
    assert torch.equal(generated(exported, ids[:1], mask[:1], assistant_model=model), plain)
    assert torch.equal(generated(exported, ids[:1], mask[:1], prompt_lookup_num_tokens=2), plain)


def test_a_text_is_continued_from_its_cache(exported, model):
    ids, mask = ragged()
    first = exported.generate(ids[:1], **PLAIN, return_dict_in_generate=True)
    more = torch.cat([first.sequences, ids[:1]], 1)
    kept = exported.generate(more, past_key_values=first.past_key_values, **PLAIN)
    assert torch.equal(kept, model.generate(more, **PLAIN))


@torch.no_grad()
def test_it_is_called_like_the_model(exported, model):
    ids, mask = ragged()
    answer = exported(input_ids=ids, attention_mask=mask)
    # as generate has them; a call of the model alone counts padding
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(answer.logits[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-3)
    again = exported(input_ids=ids, past_key_values=answer.past_key_values, attention_mask=torch.cat([mask, mask], 1))
    assert again.past_key_values.get_seq_length() == 12
    assert exported(ids, use_cache=False).past_key_values is None
    assert exported.can_generate() and exported.generation_config.eos_token_id == model.config.eos_token_id


def test_its_perplexity_is_that_of_the_packed_model(exported, model):
    class Tokenizer:
        def decode(self, ids, **kwargs):
            return "a word " * 5

    ids = torch.randint(2, 60, (50,)).tolist()
    found, expected = (perplexity(one, Tokenizer(), ids, max_length=16).nll for one in (exported, model))
    assert found == pytest.approx(expected, rel=1e-3)


def test_another_cache_and_positions_are_refused(exported, model):
    ids, _ = ragged()
    with pytest.raises(LmcompressError, match="attention_mask: leave out position_ids"):
        exported(ids, position_ids=torch.zeros_like(ids))
    with torch.no_grad():
        theirs = model(ids, past_key_values=DynamicCache()).past_key_values
    with pytest.raises(LmcompressError, match="past_key_values"):
        exported(ids, past_key_values=theirs)
    with pytest.raises(LmcompressError, match="StaticCache: leave out"):
        exported(ids, past_key_values=StaticCache(config=model.config, max_cache_len=20))


def test_what_a_runtime_would_compute_nonsense_from_is_refused(exported):
    ids, mask = ragged()
    with pytest.raises(LmcompressError, match="from 0 to 63, got 64: is the tokenizer"):
        exported(torch.tensor([[5, 64]]))
    with pytest.raises(LmcompressError, match="from 0 to 63, got -1"):
        exported(torch.tensor([[5, -1]]))
    with pytest.raises(LmcompressError, match=r"shape \(3, 6\), got \(3, 5\)"):
        exported(ids, attention_mask=mask[:, 1:])
    with pytest.raises(LmcompressError, match=r"got torch.int64 \(0, 4\)"):
        exported(ids[:0, :4])
    with pytest.raises(LmcompressError, match="40 positions, got 41 tokens"):
        exported(torch.full((1, 41), 5))
    cache = exported(torch.full((1, 40), 5)).past_key_values
    with pytest.raises(LmcompressError, match="40 positions, got 41 tokens"):
        exported(ids[:1, :1], past_key_values=cache)
    # padding has no positions
    padded = torch.nn.functional.pad(torch.ones(1, 40, dtype=torch.int64), (5, 0))
    logits = exported(torch.full((1, 45), 5), attention_mask=padded).logits[:, 5:]
    wanted = exported(torch.full((1, 40), 5)).logits
    # a number between two codes may go to either
    assert float((logits - wanted).norm() / wanted.norm()) < 0.05


def test_states_follow_the_rows_of_the_cache(folders):
    exported = load_exported(folders["openvino"][0], threads=1, precision="f32")
    ids, mask = ragged()
    cache = exported(ids, attention_mask=mask).past_key_values
    assert isinstance(cache, StateCache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="must be negative"):
        cache.crop(3)
    cache.crop(-1)
    rows = [2, 2, 0, 0]
    found = exported(ids[rows][:, -1:], attention_mask=mask[rows], past_key_values=cache).logits
    torch.testing.assert_close(found[:, 0], exported(ids[rows], attention_mask=mask[rows]).logits[:, -1])


_WITHOUT_TORCH = "import sys\nsys.modules['torch'] = sys.modules['lmcompress'] = None\n"


@pytest.mark.parametrize("to", RUNTIMES)
def test_the_code_of_the_card_generates_without_torch(to, folders, model):
    folder, _ = folders[to]
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", _WITHOUT_TORCH + code.group(1)]
    ran = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expected = model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    # in bfloat16 where OpenVINO chooses it
    found = [int(number) for number in re.findall(r"\d+", ran.stdout)]
    assert len(found) == 24 and (to == "openvino" or found == expected[0].tolist())


@pytest.mark.parametrize("to", RUNTIMES)
def test_the_card_names_states_where_keys_and_values_are_no_inputs(to, folders):
    text = (folders[to][0] / "README.md").read_text()
    interface = text[: text.index("* activations")]
    assert ("beam_idx, `(batch)` int32" in interface) == ("* states: " in interface) == (to == "openvino")
    assert ("of keys and values, `(batch, heads, length, head size)` float32" in interface) == (to == "onnx")
    assert "x64quantprecision" not in text or to == "onnx"


@pytest.mark.slow
@pytest.mark.parametrize("to", RUNTIMES)
def test_without_past_every_call_reads_the_whole_text(to, model, tmp_path):
    report = export_model(model, tmp_path / "m", to=to, task="text_generation")
    exported = load_exported(tmp_path / "m", precision="f32" if to == "openvino" else None)
    ids, mask = ragged()
    assert report.task == "text_generation" and not exported.with_past
    for how in ("greedy", "beams"):
        assert torch.equal(generated(exported, ids, mask, **HOW[how]), generated(model, ids, mask, **HOW[how]))
    with pytest.raises(LmcompressError, match="exported without past keys and values"):
        exported(ids, past_key_values=model(ids).past_key_values)


@pytest.mark.slow
def test_openvino_without_states_has_keys_and_values_as_inputs(model, tmp_path):
    export_model(model, tmp_path / "m", to="openvino", stateful=False)
    exported = load_exported(tmp_path / "m", precision="f32")
    ids, mask = ragged()
    for how in ("greedy", "beams"):
        assert torch.equal(generated(exported, ids, mask, **HOW[how]), generated(model, ids, mask, **HOW[how]))


@pytest.mark.slow
@pytest.mark.parametrize("to", RUNTIMES)
@pytest.mark.parametrize("name", DECODERS)
def test_every_family_generates(name, to, tmp_path):
    model = packed(cut_unevenly(decoder(name)), inputs="static", granularity=PerRow())
    report = export_model(model, tmp_path / "m", to=to)
    exported = load_exported(tmp_path / "m", precision="f32" if to == "openvino" else None)
    ids, mask = ragged()
    assert report.comparison.relative_error < 0.02
    found = generated(exported, ids[:1], mask[:1])
    assert torch.equal(found, continued(model, ids[:1]))
    # by generate too where positions count from 0; RoBERTa's are given, which generate counts from 0 as well
    positions = torch.arange(ids.shape[1])[None] + first_position(model.config)
    assert torch.equal(found, generated(model, ids[:1], mask[:1], position_ids=positions))


@torch.no_grad()
def test_positions_are_those_of_the_models_own_forward_pass_not_those_of_generate(tmp_path):
    model = decoder("roberta")
    seen = []
    model.roberta.embeddings.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["position_ids"]), with_kwargs=True
    )
    export_model(model, tmp_path / "m")
    exported = load_exported(tmp_path / "m")
    ids, mask = ragged()
    assert model.config.pad_token_id == 1 and ids[1, 0] == 1
    wanted = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(exported(ids, attention_mask=mask).logits[mask.bool()], wanted[mask.bool()])
    expected = continued(model, ids[:1])
    assert torch.equal(generated(exported, ids[:1], mask[:1]), expected)
    seen.clear()
    others = generated(model, ids[:1], mask[:1])
    assert seen[0].tolist() == [[0, 1, 2, 3, 4, 5]] and not torch.equal(others, expected)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [name for name in INPUTS if name != "static"])
def test_every_range_of_activations(inputs, tmp_path):
    model = compressed(inputs)
    report = export_model(model, tmp_path / "m")
    ids, mask = ragged()
    exported = load_exported(tmp_path / "m")
    assert report.comparison.relative_error < 0.02
    assert torch.equal(generated(exported, ids[:1], mask[:1]), generated(model, ids[:1], mask[:1]))
