import pytest
from families import cut_to_nothing, make
from packing import packed

from lmcompress.errors import LmcompressError
from lmcompress.families import ZeroWidthLinear, anatomy_of
from lmcompress.families.weights import modules_by_path
from lmcompress.quantization import ActivationScheme, QuantizationConfig, Rule, WeightScheme, plan

FOUR = WeightScheme(quantizer="minmax", bits=4, granularity="row")


def by_path(model, **config):
    return {planned.path: planned for planned in plan(model, QuantizationConfig(**config)).matrices}


@pytest.mark.parametrize("head", ["base", "classification", "language"])
def test_by_default_blocks_and_word_embeddings_are_planned_and_nothing_else(family, head):
    model = make(family, head)
    anatomy = anatomy_of(model)
    paths = {id(module): path for path, module in modules_by_path(model).items()}
    parts = ("qkv",) if family.name == "gpt2" else ("query", "key", "value")
    ffn = ("ffn_in", "ffn_gate", "ffn_out") if family.name == "llama" else ("ffn_in", "ffn_out")
    expected = {paths[id(block.get(part))] for block in anatomy.blocks for part in (*parts, "attention_out", *ffn)}
    expected.add(paths[id(anatomy.embedding("word_embeddings"))])
    planned = by_path(model)
    assert planned.keys() == expected
    words = planned[paths[id(anatomy.embedding("word_embeddings"))]]
    assert words.weights.granularity == "row"
    # Llama's head has a matrix of its own
    tied = head == "language" and family.name != "llama"
    assert len(words.tied) == tied == (words.inputs is not None)


def test_paths_are_the_same_with_a_head_and_without():
    assert by_path(make("gpt2", "base")).keys() == by_path(make("gpt2", "language")).keys()


def test_only_what_follows_the_activation_is_asymmetric(family):
    planned = by_path(make(family, "language")).values()
    # a gate has both signs
    one_sided = set() if family.name == "llama" else {"ffn_out"}
    assert {p.part for p in planned if p.inputs is not None and not p.inputs.symmetric} == one_sided


def test_what_pruning_left_nothing_of_is_passed_over_and_said(family):
    model = cut_to_nothing(make(family))
    made = plan(model, QuantizationConfig())
    empty = {path for path, module in modules_by_path(model).items() if isinstance(module, ZeroWidthLinear)}
    assert empty and not empty & {p.path for p in made.matrices}
    assert all("pruned to nothing" in made.dense[path] for path in empty)


def test_later_rules_count_and_none_leaves_dense():
    model = make("gpt2", "language")
    planned = by_path(
        model,
        rules=(
            Rule(modules="h.0.*", weights=FOUR, activations=None),
            Rule(modules="h.0.mlp.c_fc", weights=None),
            Rule(modules="ffn_out", activations=ActivationScheme(bits=4)),
        ),
    )
    assert planned["h.0.attn.c_attn"].weights == FOUR and planned["h.0.attn.c_attn"].inputs is None
    assert "h.0.mlp.c_fc" not in planned
    # the last rule says nothing of weights: they are the default's again
    assert planned["h.0.mlp.c_proj"].inputs.bits == 4 and planned["h.0.mlp.c_proj"].weights == WeightScheme()
    assert planned["h.1.attn.c_attn"].weights == WeightScheme()


def test_rules_add_what_is_dense_by_default():
    model = make("electra-projected")
    rules = (Rule(modules="embedding_projection", weights=FOUR), Rule(modules="classifier.*"))
    planned = by_path(model, rules=rules)
    assert planned["embeddings_project"].weights == FOUR
    assert planned["classifier.dense"].weights == WeightScheme() and planned["classifier.dense"].block is None
    untied = make("gpt2", "language", tie_word_embeddings=False)
    assert "lm_head" not in by_path(untied)
    assert by_path(untied, rules=(Rule(modules="head"),))["lm_head"].inputs.symmetric


def test_of_a_tied_head_a_rule_can_name_the_input_only():
    model = make("gpt2", "language")
    assert by_path(model, rules=(Rule(modules="head", activations=None),))["wte"].inputs is None
    with pytest.raises(LmcompressError, match="lm_head is tied to wte .* name 'embeddings' instead"):
        plan(model, QuantizationConfig(rules=(Rule(modules="head", weights=FOUR),)))
    dense = plan(model, QuantizationConfig(rules=(Rule(modules="embeddings", weights=None),))).dense
    assert "rule for 'embeddings'" in dense["wte"] and "tied to wte" in dense["lm_head"]


def test_what_stays_dense_is_said_with_a_reason():
    dense = plan(make("bert", "classification"), QuantizationConfig(embeddings=None)).dense
    assert dense["embeddings.word_embeddings"] == "the config has no embeddings"
    assert "always stay dense" in dense["embeddings.position_embeddings"]
    assert "a rule that names it" in dense["pooler.dense"] and "classifier" in dense


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(rules=(Rule(modules="ffn_uot"),)), "matches no matrix of this model; did you mean 'ffn_out'"),
        (dict(rules=(Rule(modules="h.7.*"),)), "matches no matrix"),
        (dict(rules=(Rule(modules="wpe"),)), "can do nothing: wpe: position embeddings always stay dense"),
        (dict(weights=None, embeddings=None), "nothing of this GPT2LMHeadModel would be quantized"),
        (dict(rules=(Rule(modules="*", weights=WeightScheme()), Rule(modules="*", weights=None))), "nothing of this"),
        (dict(weights=WeightScheme(granularity=5)), "h.0.attn.c_attn: the size of a group must divide .* rows of 16"),
    ],
)
def test_what_cannot_be_done_is_refused(config, message):
    with pytest.raises(LmcompressError, match=message):
        plan(make("gpt2", "language"), QuantizationConfig(**config))


def test_what_is_packed_is_refused_by_trainers_too():
    with pytest.raises(LmcompressError, match=r"cannot quantize a model that is packed already: .*unpacked\(model\)"):
        plan(packed(make("bert")), QuantizationConfig())


def test_a_plan_reads_as_a_text():
    text = str(plan(make("bert"), QuantizationConfig()))
    assert "matrices: dynamic_scaling 8 by tensor, inputs 8 bits dynamic symmetric" in text
    assert "attention: 8 bits dynamic" in text and "pooler.dense" in text
