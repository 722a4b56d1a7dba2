from __future__ import annotations

import copy

import pytest
import torch
from families import HEAD_SIZE, make, outputs
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from lmcompress import CompressedModel
from lmcompress.checkpoint.cutting import keep_heads, keep_neurons
from lmcompress.checkpoint.structure import structure_of
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, weight_view
from lmcompress.students.layers import CHOICES, by_layers, choose_layers
from lmcompress.students.named_shapes import NAMED_SHAPES, named
from lmcompress.students.shape import by_shape


@pytest.fixture(params=["classification", "language"])
def teacher(request, family):
    head = request.param
    torch.manual_seed(0)
    model = make(family, head)
    with torch.no_grad():
        for parameter in model.parameters():  # LayerNorms that tell one place from another
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False)


def bert():
    return make("bert")


def trains(model):
    model.train()(input_ids=torch.arange(2, 14).view(2, 6)).logits.square().sum().backward()
    return all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        ("uniform", (0, 2, 4, 7, 9, 11)),  # transformers' scripts/extract_distilbert.py
        ("first", (0, 1, 2, 3, 4, 5)),
        ("last", (6, 7, 8, 9, 10, 11)),
        ("skip", (1, 3, 5, 7, 9, 11)),
    ],
)
def test_six_of_twelve_are_those_of_the_papers(choose, expected):
    assert choose_layers(12, 6, choose) == expected


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.sampled_from(CHOICES))
def test_chosen_layers_rise_are_there_and_are_as_many_as_asked(sizes, choose):
    total, keep = sizes
    layers = choose_layers(total, keep, choose)
    assert len(layers) == keep
    assert list(layers) == sorted(set(layers))
    assert 0 <= layers[0] and layers[-1] < total
    if keep == total:
        assert layers == tuple(range(total))


@given(st.integers(2, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(2, n))))
def test_uniform_layers_include_both_ends_and_are_evenly_spread(sizes):
    layers = choose_layers(*sizes)
    gaps = {b - a for a, b in zip(layers, layers[1:], strict=False)}
    assert layers[0] == 0 and layers[-1] == sizes[0] - 1
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("keep", [0, 13, -1])
def test_a_student_cannot_have_more_layers_than_its_teacher_or_none(keep):
    with pytest.raises(LmcompressError, match=f"keep 1 to 12 layers, got {keep}"):
        choose_layers(12, keep)


def test_a_misspelt_choice_is_helped_with():
    with pytest.raises(LmcompressError, match="did you mean 'uniform'"):
        choose_layers(12, 6, "unifrom")


def test_all_layers_answer_as_the_teacher_and_share_no_memory(teacher):
    student = by_layers(teacher, 3)
    assert student.layers == (0, 1, 2)
    torch.testing.assert_close(outputs(student.model), outputs(teacher), rtol=0, atol=0)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_fewer_layers_are_the_teachers_blocks_and_train(teacher):
    student = by_layers(teacher, 2, choose="last")
    assert student.layers == (1, 2)
    assert student.model.config.num_hidden_layers == 2
    assert teacher.config.num_hidden_layers == len(anatomy_of(teacher).blocks) == 3
    for mine, index in zip(anatomy_of(student.model).blocks, student.layers, strict=True):
        theirs = anatomy_of(teacher).blocks[index].module.state_dict()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.module.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert trains(student.model)


def test_layers_can_be_named_in_any_order(teacher):
    assert by_layers(teacher, [2, 0]).layers == (2, 0)
    with pytest.raises(LmcompressError, match=r"numbers from 0 to 2.*got \[0, 4\]"):
        by_layers(teacher, [0, 4])
    with pytest.raises(LmcompressError, match=r"without repetition; got \[1, 1\]"):
        by_layers(teacher, [1, 1])


def test_hooks_of_the_teacher_stay_with_the_teacher():
    teacher, seen = bert(), []
    handle = teacher.bert.encoder.layer[0].register_forward_hook(lambda *a: seen.append(1))
    outputs(by_layers(teacher, 3).model)
    assert not seen
    outputs(teacher)
    assert seen
    handle.remove()


def test_an_unevenly_pruned_teacher_gives_a_student_that_saves(tmp_path):
    teacher = bert()
    blocks = anatomy_of(teacher).blocks
    keep_heads(blocks[1], [0, 2])
    keep_neurons(blocks[2], range(7))
    CompressedModel(teacher).save_pretrained(tmp_path / "teacher")
    loaded = CompressedModel.from_pretrained(tmp_path / "teacher").model
    student = by_layers(loaded, [1, 2]).model
    student.save_pretrained(tmp_path / "student")
    again = type(student).from_pretrained(tmp_path / "student")
    assert [(b.heads, b.ffn) for b in structure_of(again).blocks] == [(2, 24), (4, 7)]
    torch.testing.assert_close(outputs(again), outputs(student))


def test_only_layers_given_by_shape_does_what_by_layers_does(teacher):
    one, other = by_layers(teacher, 2), by_shape(teacher, layers=2)
    assert one.layers == other.layers == (0, 2)
    torch.testing.assert_close(outputs(one.model), outputs(other.model), rtol=0, atol=0)
    assert one.model.config.num_hidden_layers == other.model.config.num_hidden_layers
    assert other.model.config.num_labels == teacher.config.num_labels


def test_dropping_neurons_that_do_nothing_changes_nothing(teacher):
    """An independent statement of "the most important stay": whatever is dead goes first."""
    width = anatomy_of(teacher).blocks[0].ffn_width
    keep = width // 2
    dead = torch.randperm(width, generator=torch.Generator().manual_seed(3))[: width - keep]
    with torch.no_grad():
        for block in anatomy_of(teacher).blocks:
            weight_view(block.get("ffn_in"))[dead] = 0
            block.get("ffn_in").bias[dead] = 0
            weight_view(block.get("ffn_out"))[:, dead] = 0
    student = by_shape(teacher, intermediate_size=keep).model
    torch.testing.assert_close(outputs(student), outputs(teacher))


def test_a_width_cut_is_one_consistent_choice_of_dimensions(teacher):
    """Tensors of the student, found again in the teacher's: the same hidden dimensions everywhere."""
    student = by_shape(teacher, hidden_size=12, num_heads=3)
    assert trains(by_shape(teacher, hidden_size=12, num_heads=3, layers=2).model)
    new, old = anatomy_of(student.model), anatomy_of(teacher)
    assert (new.hidden_size, new.blocks[0].num_heads, new.blocks[0].head_size) == (12, 3, HEAD_SIZE)
    position_new = new.embedding("position_embeddings").weight
    position_old = old.embedding("position_embeddings").weight
    if position_old.shape[1] == 16:
        dims = [next(j for j in range(16) if torch.equal(position_old[:, j], column)) for column in position_new.T]
    else:  # ELECTRA with embeddings of their own width
        bias_new, bias_old = (a.embedding("embedding_projection").bias for a in (new, old))
        dims = [next(j for j in range(16) if bias_old[j] == value) for value in bias_new]
    assert dims == sorted(dims)
    for mine, theirs in zip(new.blocks, old.blocks, strict=True):
        out = weight_view(mine.get("ffn_out"))
        columns = weight_view(theirs.get("ffn_out"))[dims]
        assert all(any(torch.equal(column, full) for full in columns.T) for column in out.T)
        torch.testing.assert_close(mine.get("ffn_out").bias, theirs.get("ffn_out").bias[dims])


def test_heads_that_do_nothing_go_first():
    teacher = bert()
    with torch.no_grad():
        for block in anatomy_of(teacher).blocks:
            for part in ("query", "key", "value"):
                weight_view(block.get(part))[4:8] = 0
            weight_view(block.get("attention_out"))[:, 4:8] = 0
    student = by_shape(teacher, hidden_size=12)  # three heads of four
    block = anatomy_of(student.model).blocks[0]
    assert block.num_heads == 3
    assert weight_view(block.get("query")).abs().sum(1).min() > 0


def test_narrower_heads_keep_query_and_key_together():
    teacher = make("gpt2", "language")
    student = by_shape(teacher, hidden_size=8, num_heads=4).model
    block, theirs = anatomy_of(student).blocks[0], anatomy_of(teacher).blocks[0]
    assert (block.num_heads, block.head_size) == (4, 2)
    with torch.no_grad():  # mark the place of each output of c_attn by its bias, and cut again
        theirs.get("qkv").bias.copy_(torch.arange(48.0))
    marked = anatomy_of(by_shape(teacher, hidden_size=8, num_heads=4).model).blocks[0].get("qkv").bias
    query, key, value = marked.split(8)
    torch.testing.assert_close(query + 16, key)
    assert ((query // 4) == torch.arange(4.0).repeat_interleave(2)).all()
    assert (32 <= value).all()


def test_defaults_keep_the_head_size_and_the_proportion_of_the_ffn():
    student = by_shape(bert(), hidden_size=8).model
    assert student.config.num_attention_heads == 2
    assert student.config.intermediate_size == 12
    gpt = by_shape(make("gpt2", n_inner=None), hidden_size=8).model
    assert gpt.config.n_inner is None and anatomy_of(gpt).blocks[0].ffn_width == 32


def test_random_students_depend_on_their_seed_only_and_leave_the_generator_alone(teacher):
    state = torch.random.get_rng_state()
    one, again, other = (by_shape(teacher, layers=6, initialise="random", seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert one.layers == () and one.model.config.num_hidden_layers == 6
    torch.testing.assert_close(one.model.state_dict(), again.model.state_dict(), rtol=0, atol=0)
    assert not torch.equal(outputs(one.model), outputs(other.model))


def test_students_save_and_load_as_stock_models(teacher, tmp_path):
    student = by_shape(teacher, layers=2, hidden_size=8, intermediate_size=10).model
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(type(student).from_pretrained(tmp_path)), outputs(student))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(hidden_size=10, num_heads=4), r"10 is not divisible by 4 heads.*8 or 12.*width 10: 5"),
        (dict(hidden_size=18), r"18 is not divisible by 4 heads"),
        (dict(num_heads=8, hidden_size=32), r"num_heads would be 8, the teacher's blocks have 4"),
        (dict(num_heads=2), r"the width of a head would be 8, the teacher's blocks have 4"),
        (dict(intermediate_size=33), r"intermediate_size would be 33.*have 24"),
        (dict(intermediate_size=0), r"intermediate_size must be at least 1, got 0"),
        (dict(hidden_size=0), r"hidden_size must be at least 1, got 0"),
        (dict(num_heads=0), r"num_heads must be at least 1, got 0"),
        (dict(layers=5), r"keep 1 to 3 layers, got 5"),
        (dict(layers=0, initialise="random"), r"layers must be at least 1, got 0"),
        (dict(initialise="slices"), r"did you mean 'slice'"),
    ],
)
def test_impossible_shapes_are_refused_with_the_nearest_possible(sizes, message):
    with pytest.raises(LmcompressError, match=message):
        by_shape(bert(), **sizes)


@pytest.mark.parametrize(
    ("name", "millions"), [("T6", 65), ("T3", 44), ("T3-small", 17), ("T4-tiny", 14), ("T12-nano", 17)]
)
def test_named_shapes_have_the_parameters_that_textbrewer_counts(name, millions):
    with torch.device("meta"):
        teacher = BertModel(BertConfig(vocab_size=28996))
    student = named(name, teacher).model
    shape = NAMED_SHAPES[name]
    assert student.device.type == "meta"
    assert (student.config.hidden_size, student.config.num_attention_heads) == (shape.hidden_size, shape.num_heads)
    assert int(sum(p.numel() for p in student.parameters()) / 1e6) in (millions - 1, millions)


def test_distilled_gpt2_has_six_blocks_and_the_published_size():
    with torch.device("meta"):
        teacher = GPT2LMHeadModel(GPT2Config())
    student = named("DistilGPT2", teacher)
    assert student.layers == (0, 2, 4, 7, 9, 11)
    assert sum(p.numel() for p in student.model.parameters()) == 81_912_576  # distilbert/distilgpt2 on the Hub


def test_a_teacher_smaller_than_a_named_shape_is_refused():
    with pytest.raises(LmcompressError, match=r"'T4-tiny' is absolute.*hidden_size 312 \(the teacher has 16\)"):
        named("T4-tiny", bert())
    assert named("T4-tiny", bert(), initialise="random").model.config.hidden_size == 312
    with pytest.raises(LmcompressError, match="did you mean 'T4-tiny'"):
        named("T4tiny", bert())
