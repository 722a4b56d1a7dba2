import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from lmcompress.distillation.matches import MATCHES, MatchLoss, match_for
from lmcompress.distillation.matches.features import (
    attention_ce,
    attention_ce_mean,
    attention_mse,
    attention_mse_mean,
    hidden_cosine,
    hidden_mse,
    pkd,
)
from lmcompress.distillation.matches.relations import (
    attention_kl,
    attention_transfer,
    gram,
    nst,
    relation_kl,
    value_relation_kl,
)
from lmcompress.errors import LmcompressError

BATCH, LENGTH, HEADS, WIDTH = 3, 5, 4, 8
# padding on the right, on the left and in none
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])

READY = {f"{name}-{feature}": match.on(feature) for name, match in MATCHES.items() for feature in match.features}
each_match = pytest.mark.parametrize("match", READY.values(), ids=READY)
each_causal = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def feature(kind, seed, *, heads=HEADS, width=WIDTH, causal=False, mask=MASK):
    generator = torch.Generator().manual_seed(seed)
    batch, length = mask.shape
    if kind == "hidden":
        return torch.randn(batch, length, width, generator=generator)
    if kind in ("scores", "probabilities"):
        scores = 2 * torch.randn(batch, heads, length, length, generator=generator)
        if kind == "scores":
            return scores
        allowed = mask.bool()[:, None, None, :].expand_as(scores)
        if causal:
            allowed = allowed & torch.ones(length, length).tril().bool()
        return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.randn(batch, heads, length, width // HEADS, generator=generator)


def features(match, seed, **options):
    made = tuple(feature(match.feature, seed + 100 * layer, **options) for layer in range(match.layers))
    return made if match.layers == 2 else made[0]


def spoil(given, value):
    """Puts ``value`` wherever padding is, in every layer of a feature."""
    if isinstance(given, tuple):
        return tuple(spoil(one, value) for one in given)
    given = given.clone()
    valid = MASK.bool()
    if given.dim() == 3:
        given[~valid] = value
    elif given.shape[2] == given.shape[3]:
        pairs = (valid[:, :, None] & valid[:, None, :])[:, None].expand_as(given)
        given[~pairs] = value
    else:
        given[~valid[:, None].expand(given.shape[:3])] = value
    return given


def leaves(given):
    return list(given) if isinstance(given, tuple) else [given]


def rows(given, b):
    return tuple(one[b : b + 1] for one in given) if isinstance(given, tuple) else given[b : b + 1]


@each_match
@each_causal
def test_matches_are_zero_at_the_teacher_and_positive_elsewhere(match, causal):
    teacher, student = features(match, 0, causal=causal), features(match, 1, causal=causal)
    here, elsewhere = (match(f, teacher, MASK, causal=causal) for f in (teacher, student))
    assert here.shape == (BATCH,) and here.dtype == torch.float32
    if match.name in ("attention_ce", "attention_ce_mean"):
        # the teacher's entropy stays: the least value, not 0
        assert (elsewhere > here).all() and (here > 0).all()
    else:
        torch.testing.assert_close(here, torch.zeros(BATCH), atol=1e-5, rtol=0)
        assert (elsewhere > 1e-4).all()


@each_match
@each_causal
@pytest.mark.parametrize("value", [7.0, float("nan"), float("-inf")])
def test_what_stands_at_padding_does_not_matter(match, causal, value):
    student, teacher = features(match, 0, causal=causal), features(match, 1, causal=causal)
    expected = match(student, teacher, MASK, causal=causal)
    spoilt_student = spoil(student, value)
    for leaf in leaves(spoilt_student):
        leaf.requires_grad_()
    result = match(spoilt_student, spoil(teacher, value), MASK, causal=causal)
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(spoilt_student))


@each_match
@each_causal
def test_a_batch_is_its_examples(match, causal):
    student, teacher = features(match, 0, causal=causal), features(match, 1, causal=causal)
    alone = [match(rows(student, b), rows(teacher, b), MASK[b : b + 1], causal=causal) for b in range(BATCH)]
    torch.testing.assert_close(match(student, teacher, MASK, causal=causal), torch.cat(alone))


@each_match
def test_gradients_flow_to_the_student_only(match):
    student, teacher = features(match, 0), features(match, 1)
    for leaf in leaves(student) + leaves(teacher):
        leaf.requires_grad_()
    match(student, teacher, MASK).sum().backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves(student))
    assert all(leaf.grad is None for leaf in leaves(teacher))


@each_match
def test_arithmetic_is_float32_under_autocast_and_for_bfloat16(match):
    student, teacher = features(match, 0), features(match, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(match(student, teacher, MASK), match(student, teacher, MASK.bool()))
        inside = match(student, teacher, MASK)
    torch.testing.assert_close(inside, match(student, teacher, MASK), rtol=1e-6, atol=1e-7)
    half = [tuple(leaf.bfloat16() for leaf in leaves(f)) for f in (student, teacher)]
    half = [f if match.layers == 2 else f[0] for f in half]
    assert match(*half, MASK).dtype == torch.float32


@each_match
def test_an_example_of_padding_alone_costs_nothing(match):
    student, teacher = features(match, 0), features(match, 1)
    for leaf in leaves(student):
        leaf.requires_grad_()
    result = match(student, teacher, torch.zeros(BATCH, LENGTH))
    torch.testing.assert_close(result, torch.zeros(BATCH))
    result.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(student))


@each_match
def test_matches_refuse_two_lengths(match):
    longer = torch.ones(BATCH, LENGTH + 1)
    with pytest.raises(LmcompressError, match="length 5 and teacher length 6; different lengths mean different token"):
        match(features(match, 0), features(match, 1, mask=longer), MASK)


@each_match
def test_matches_refuse_two_batches_and_masks_of_another_shape(match):
    student, teacher = features(match, 0), features(match, 1)
    with pytest.raises(LmcompressError, match="needs one batch, got 1 examples and the teacher's 3"):
        match(rows(student, 0), teacher, MASK)
    with pytest.raises(LmcompressError, match=r"\(batch, length\) = \(3, 5\), got \(3, 4\)"):
        match(student, teacher, MASK[:, :4])


@each_match
def test_matches_refuse_features_of_another_kind(match):
    wrong = torch.zeros(2, 2)
    wrong = (wrong, wrong) if match.layers == 2 else wrong
    with pytest.raises(LmcompressError, match=r"needs (hidden states|attention|vectors of heads).*\(2, 2\)"):
        match(wrong, wrong, MASK)


@pytest.mark.parametrize("match", [m for m in READY.values() if m.projectable], ids=lambda m: m.name)
def test_matches_of_states_refuse_unequal_widths_and_suggest_a_projection(match):
    with pytest.raises(LmcompressError, match="got student 4 and teacher 8; add a projection"):
        match(features(match, 0, width=4), features(match, 1), MASK)


@pytest.mark.parametrize("name", ["nst", "attention_transfer", "minilm_value", "minilmv2_query"])
def test_matches_that_need_no_projection_take_unequal_widths(name):
    match = MATCHES[name]
    assert not match.projectable
    assert (match(features(match, 0, width=16), features(match, 1), MASK) > 0).all()


@pytest.mark.parametrize("name", ["attention_mse", "attention_ce"])
@pytest.mark.parametrize("on", ["scores", "probabilities"])
def test_unequal_heads_are_refused_by_head_and_taken_by_mean(name, on):
    student, teacher = feature(on, 0, heads=2), feature(on, 1)
    with pytest.raises(LmcompressError, match=f"got 2 heads of the student and 4 of the teacher; use {name}_mean or "):
        match_for(name, on)(student, teacher, MASK)
    assert (match_for(f"{name}_mean", on)(student, teacher, MASK) > 0).all()


@pytest.mark.parametrize("name", ["minilm_attention", "minilm_value"])
def test_minilm_refuses_unequal_heads_and_suggests_its_second_version(name):
    match = MATCHES[name]
    with pytest.raises(LmcompressError, match="got 2 heads of the student and 4 of the teacher; use minilmv2_query"):
        match(features(match, 0, heads=2), features(match, 1), MASK)


def test_hidden_matches_are_their_formulas():
    student, teacher = feature("hidden", 0), feature("hidden", 1)
    mask = MASK.float()
    torch.testing.assert_close(
        hidden_mse(student, teacher, MASK), ((student - teacher) ** 2 * mask[..., None]).sum((1, 2)) / WIDTH
    )
    cosine = torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    torch.testing.assert_close(hidden_cosine(student, teacher, MASK), ((1 - cosine) * mask).sum(1))


def test_pkd_counts_positions_among_real_tokens():
    student, teacher = feature("hidden", 0), feature("hidden", 1)
    for position, places in [(0, [0, 1, 0]), (-1, [2, 4, 4]), (1, [1, 2, 1]), (-3, [0, 2, 2])]:
        s, t = (torch.stack([f[b, place] for b, place in enumerate(places)]) for f in (student, teacher))
        expected = (s / s.norm(dim=1, keepdim=True) - t / t.norm(dim=1, keepdim=True)).square().sum(1)
        torch.testing.assert_close(pkd(student, teacher, MASK, position=position), expected)
    assert pkd(student, teacher, MASK, position=3)[0] == 0


def test_pkd_and_cosine_do_not_feel_length_and_survive_zero_vectors():
    student, teacher = feature("hidden", 0), feature("hidden", 1)
    for match in (pkd, hidden_cosine):
        torch.testing.assert_close(match(5 * student, teacher, MASK), match(student, teacher, MASK))
        nothing = torch.zeros_like(student, requires_grad=True)
        value = match(nothing, teacher, MASK)
        value.sum().backward()
        assert value.isfinite().all() and nothing.grad.isfinite().all()


def test_gram_and_nst_are_their_formulas():
    (s_a, t_a), (s_b, t_b) = ((feature("hidden", seed), feature("hidden", seed + 1)) for seed in (0, 10))
    for b in range(BATCH):
        valid = MASK[b].bool()
        s1, s2, t1, t2 = (f[b, valid] for f in (s_a, s_b, t_a, t_b))
        expected = ((s1.T @ s2 - t1.T @ t2) / valid.sum()).square().mean()
        torch.testing.assert_close(gram((s_a, s_b), (t_a, t_b), MASK)[b], expected)
        difference = (s1 @ s2.T - t1 @ t2.T) / WIDTH
        torch.testing.assert_close(nst((s_a, s_b), (t_a, t_b), MASK)[b], difference.square().sum())
        torch.testing.assert_close(nst((s_a, s_b), (t_a, t_b), MASK, causal=True)[b], difference.tril().square().sum())


def test_nst_does_not_see_rotations_of_the_states():
    teacher = feature("hidden", 0)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)))[0]
    rotated = teacher @ rotation
    torch.testing.assert_close(nst((rotated, rotated), (teacher, teacher), MASK), torch.zeros(BATCH), atol=1e-5, rtol=0)


def test_attention_transfer_is_its_formula_and_does_not_feel_scale():
    student, teacher = feature("hidden", 0), feature("hidden", 1, width=16)
    for power in (1.0, 2.0, 4.0):
        result = attention_transfer(student, teacher, MASK, power=power)
        for b in range(BATCH):
            valid = MASK[b].bool()
            s, t = (f[b, valid].abs().pow(power).mean(1) for f in (student, teacher))
            torch.testing.assert_close(result[b], (s / s.norm() - t / t.norm()).square().mean())
    torch.testing.assert_close(
        attention_transfer(3 * student, teacher, MASK), attention_transfer(student, teacher, MASK)
    )
    with pytest.raises(LmcompressError, match="power must be >= 1"):
        attention_transfer(student, teacher, MASK, power=0.5)


def cut(scores, b, head, causal):
    """For one example and head: its queries' scores over the keys that count."""
    places = MASK[b].nonzero().squeeze(1).tolist()
    return [scores[b, head, i, [j for j in places if j <= i or not causal]].double().numpy() for i in places]


@each_causal
def test_attention_losses_agree_with_scipy(causal):
    student, teacher = feature("scores", 0), feature("scores", 1)
    for b in range(BATCH):
        squares = divergence = entropy = 0.0
        for head in range(HEADS):
            for s, t in zip(cut(student, b, head, causal), cut(teacher, b, head, causal), strict=True):
                squares += ((s - t) ** 2).sum()
                p, q = softmax(t), softmax(s)
                divergence += rel_entr(p, q).sum()
                entropy -= rel_entr(p, 1).sum()
        mse = attention_mse(student, teacher, MASK, causal=causal)[b].item()
        assert mse == pytest.approx(squares / HEADS, rel=1e-5)
        kl = attention_kl(student, teacher, MASK, causal=causal)[b].item()
        assert kl == pytest.approx(divergence / HEADS, rel=1e-4)
        ce = attention_ce(student, teacher, MASK, on="scores", causal=causal)[b].item()
        assert ce == pytest.approx((divergence + entropy) / HEADS, rel=1e-4)


@each_causal
def test_cross_entropy_of_probabilities_is_that_of_their_scores(causal):
    student, teacher = (feature("scores", seed) for seed in (0, 1))
    after = [feature("probabilities", seed, causal=causal) for seed in (0, 1)]
    torch.testing.assert_close(
        attention_ce(*after, MASK, on="probabilities", causal=causal),
        attention_ce(student, teacher, MASK, on="scores", causal=causal),
    )


def test_cross_entropy_survives_a_student_that_gives_no_probability():
    student = torch.eye(LENGTH).expand(BATCH, HEADS, LENGTH, LENGTH).clone().requires_grad_()
    value = attention_ce(student, feature("probabilities", 0), MASK, on="probabilities")
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all()


def test_cross_entropy_refuses_other_features():
    with pytest.raises(LmcompressError, match="on must be 'scores' or 'probabilities', got 'values'"):
        attention_ce(feature("scores", 0), feature("scores", 1), MASK, on="values")


@pytest.mark.parametrize("on", ["scores", "probabilities"])
def test_means_over_heads_are_the_single_head_forms_of_the_mean(on):
    student, teacher = feature(on, 0), feature(on, 1)
    means = [f.mean(1, keepdim=True) for f in (student, teacher)]
    torch.testing.assert_close(attention_mse_mean(student, teacher, MASK), attention_mse(*means, MASK))
    torch.testing.assert_close(attention_ce_mean(student, teacher, MASK, on=on), attention_ce(*means, MASK, on=on))


def relations(vectors, b, heads):
    """Scores of the relation heads of one example, by loops over what belongs together."""
    joined = torch.cat(list(vectors[b]), dim=1)
    parts = joined.chunk(heads, dim=1)
    return torch.stack([part @ part.T / part.shape[1] ** 0.5 for part in parts])


@each_causal
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_relations_agree_with_scipy_for_any_split(causal, heads, seed):
    student, teacher = feature("queries", seed, heads=2, width=16), feature("queries", seed + 1)
    result = relation_kl(student, teacher, MASK, relation_heads=heads, causal=causal)
    s, t = (torch.stack([relations(f, b, heads) for b in range(BATCH)]) for f in (student, teacher))
    for b in range(BATCH):
        expected = sum(
            rel_entr(softmax(row_t), softmax(row_s)).sum()
            for head in range(heads)
            for row_s, row_t in zip(cut(s, b, head, causal), cut(t, b, head, causal), strict=True)
        )
        assert result[b].item() == pytest.approx(expected / heads, rel=1e-3, abs=1e-5)


def test_value_relations_are_relations_split_as_the_heads_are():
    student, teacher = feature("values", 0), feature("values", 1)
    torch.testing.assert_close(
        value_relation_kl(student, teacher, MASK), relation_kl(student, teacher, MASK, relation_heads=HEADS)
    )
    torch.testing.assert_close(
        relation_kl(student, teacher, MASK), relation_kl(student, teacher, MASK, relation_heads=HEADS)
    )


def test_relations_refuse_heads_that_do_not_divide():
    student, teacher = feature("keys", 0, heads=3), feature("keys", 1)
    with pytest.raises(LmcompressError, match=r"divide the student's width 6 \(3 heads of 2\), got 4"):
        relation_kl(student, teacher, MASK)
    with pytest.raises(LmcompressError, match="relation_heads must be >= 1"):
        relation_kl(student, teacher, MASK, relation_heads=0)


# not those of distributions: a distribution over more keys is another distribution
COUNTED = [m for m in READY.values() if m.unit == "pairs" or (m.unit == "tokens" and m.feature == "hidden")]


@pytest.mark.parametrize("match", COUNTED, ids=lambda m: f"{m.name}-{m.feature}")
@each_causal
def test_sums_grow_with_what_their_unit_counts(match, causal):
    """The same difference at n places costs n (or n^2, or n (n + 1) / 2) times what it costs at one."""
    ones = torch.ones(1, 4)
    given = [
        tuple(torch.full_like(leaf, value) for leaf in leaves(features(match, 0, mask=ones))) for value in (1.0, -2.0)
    ]
    given = [f if match.layers == 2 else f[0] for f in given]
    single = match(*given, torch.tensor([[1, 0, 0, 0]]), causal=causal)
    count = {"tokens": 4, "pairs": 10 if causal else 16}[match.unit]
    torch.testing.assert_close(match(*given, ones, causal=causal), count * single)


def test_attention_matches_must_be_told_their_feature():
    for name in ("attention_mse", "attention_mse_mean", "attention_ce", "attention_ce_mean"):
        assert MATCHES[name].feature is None
        with pytest.raises(
            LmcompressError, match=f"{name}.*needs the feature to compare.*on='scores' or on='probabilities'"
        ):
            match_for(name)
        with pytest.raises(LmcompressError, match="needs the feature to compare"):
            MATCHES[name](feature("scores", 0), feature("scores", 1), MASK)


def test_matches_with_one_feature_refuse_another():
    assert match_for("hidden_mse") is match_for("hidden_mse", None) is MATCHES["hidden_mse"]
    assert match_for("hidden_mse", "hidden").feature == "hidden"
    with pytest.raises(LmcompressError, match="'hidden_mse' cannot compare 'scores'.*Valid are: hidden"):
        match_for("hidden_mse", "scores")


def test_unknown_matches_and_options_get_the_nearest():
    with pytest.raises(LmcompressError, match="unknown match 'hiden_mse'; did you mean 'hidden_mse'"):
        match_for("hiden_mse")
    student, teacher = feature("hidden", 0), feature("hidden", 1)
    with pytest.raises(LmcompressError, match="'pkd' has no option 'positon'; did you mean 'position'"):
        MATCHES["pkd"](student, teacher, MASK, positon=1)
    with pytest.raises(LmcompressError, match="'hidden_mse' has no options, got 'eps'"):
        MATCHES["hidden_mse"](student, teacher, MASK, eps=1)


def test_options_are_those_a_user_may_set():
    assert MATCHES["pkd"].options == {"position", "eps"}
    assert match_for("attention_ce", "scores").options == {"eps"}
    assert MATCHES["nst"].options == frozenset()
    assert MATCHES["minilmv2_key"].options == {"relation_heads"}


def test_options_reach_the_function():
    student, teacher = feature("hidden", 0), feature("hidden", 1)
    torch.testing.assert_close(
        MATCHES["pkd"](student, teacher, MASK, position=-1), pkd(student, teacher, MASK, position=-1)
    )


@pytest.mark.parametrize("name, count", [("hidden_mse", 2), ("nst", 1)])
def test_the_number_of_layers_is_checked(name, count):
    one = feature("hidden", 0)
    given = (one, one) if count == 2 else one
    with pytest.raises(LmcompressError, match=rf"takes {3 - count} layer\(s\) of the student, got {count}"):
        MATCHES[name](given, given, MASK)


def test_textbrewers_names_are_kept():
    assert MATCHES["fsp"] is MATCHES["gram"] and MATCHES["mmd"] is MATCHES["nst"]
    assert all(isinstance(match, MatchLoss) for match in MATCHES.values())
