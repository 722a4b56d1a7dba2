"""Sentence encoders: embeddings by their definition, folders that stay what they are through every method."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from sentence_folders import SENTENCES, write_encoder
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, TrainingArguments

from lmcompress.checkpoint.cutting import keep_hidden
from lmcompress.distillation import DistillationConfig, Match
from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.pruning import PruningConfig, Target, prune
from lmcompress.quantization import quantize
from lmcompress.sentences import SentenceEncoder, is_sentence_encoder
from lmcompress.students.layers import by_layers
from lmcompress.trainers import DistillationTrainer


def by_hand(folder, pooling, *, dense=False, normalize=True):
    """Each sentence alone, so without padding."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for text in SENTENCES:
        with torch.no_grad():
            states = model(**tokenizer(text, truncation=True, max_length=12, return_tensors="pt"))[0][0]
        vector = {"mean": states.mean(0), "cls": states[0], "max": states.max(0).values}[pooling]
        if dense:
            layer = load_file(folder / "2_Dense" / "model.safetensors")
            vector = layer["linear.weight"] @ vector + layer["linear.bias"]
        found.append(vector / vector.norm() if normalize else vector)
    return torch.stack(found)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize(("dense", "normalize"), [(None, True), ("linear.Identity", False)])
def test_embeddings_are_those_of_each_sentence_alone(tmp_path, pooling, dense, normalize):
    folder = write_encoder(tmp_path / "e", pooling=pooling, dense=dense, normalize=normalize)
    encoder = SentenceEncoder.from_pretrained(folder)
    assert (encoder.pooling, encoder.normalize, encoder.max_length) == (pooling, normalize, 12)
    expected = by_hand(folder, pooling, dense=bool(dense), normalize=normalize)
    for batch_size in (1, 2, 5):
        torch.testing.assert_close(encoder.encode(SENTENCES, batch_size), expected, rtol=1e-4, atol=1e-5)


def test_a_folder_stays_one_through_pruning_and_quantization(tmp_path):
    folder = write_encoder(tmp_path / "e", dense="linear.Identity")
    encoder = SentenceEncoder.from_pretrained(folder)
    dense = encoder.encode(SENTENCES)
    prune(
        encoder.model,
        PruningConfig(target=Target(sparsity=0.3), labels="self"),
        [encoder.tokenize(SENTENCES)],
    )
    quantize(encoder.model, progress=False)
    compressed = encoder.encode(SENTENCES)
    assert not torch.allclose(compressed, dense, atol=1e-3)
    encoder.save_pretrained(tmp_path / "small", batches=[encoder.tokenize(SENTENCES)])
    assert is_sentence_encoder(tmp_path / "small")
    again = SentenceEncoder.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(again.encode(SENTENCES), compressed)
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json", "2_Dense/model.safetensors"):
        assert (tmp_path / "small" / name).read_bytes() == (folder / name).read_bytes()


def test_a_transformer_in_a_folder_of_its_own_is_saved_beside_the_modules(tmp_path):
    folder = write_encoder(tmp_path / "e")
    inner = folder / "0_Transformer"
    inner.mkdir()
    for file in [*folder.glob("*.safetensors"), *folder.glob("*oken*"), folder / "config.json"]:
        file.rename(inner / file.name)
    (folder / "sentence_bert_config.json").rename(inner / "sentence_bert_config.json")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    encoder = SentenceEncoder.from_pretrained(folder)
    encoder.save_pretrained(tmp_path / "again")
    again = SentenceEncoder.from_pretrained(tmp_path / "again")
    assert again.max_length == 12
    torch.testing.assert_close(again.encode(SENTENCES), encoder.encode(SENTENCES))


def test_a_narrower_stream_is_said_to_the_pooling_and_refused_before_a_dense(tmp_path):
    encoder = SentenceEncoder.from_pretrained(write_encoder(tmp_path / "e"))
    keep_hidden(encoder.model, range(12))
    encoder.save_pretrained(tmp_path / "narrow")
    assert json.loads((tmp_path / "narrow/1_Pooling/config.json").read_text())["word_embedding_dimension"] == 12
    assert SentenceEncoder.from_pretrained(tmp_path / "narrow").encode(SENTENCES).shape == (5, 12)
    other = SentenceEncoder.from_pretrained(write_encoder(tmp_path / "d", dense="linear.Identity"))
    keep_hidden(other.model, range(12))
    with pytest.raises(LmcompressError, match="vectors of 12 numbers, but the Dense after its pooling takes 16: keep"):
        other.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("loss", ["embedding_mse", "embedding_cosine"])
def test_a_student_of_fewer_layers_learns_the_embeddings(tmp_path, loss):
    teacher = SentenceEncoder.from_pretrained(write_encoder(tmp_path / "e"))
    student = by_layers(teacher.model, 1, choose="first").model
    rows = [{n: v[0].tolist() for n, v in teacher.tokenize([text]).items()} for text in SENTENCES]
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=30, learning_rate=3e-3, report_to="none", save_strategy="no",
        disable_tqdm=True, use_cpu=True, per_device_train_batch_size=5,
    )  # fmt: skip
    match = Match(loss=loss, student=-1, teacher=-1, options={"pooling": teacher.pooling})
    config = DistillationConfig(weight=0.0, label_weight=0.0, matches=(match,))
    wanted = teacher.encode(SENTENCES)

    def distance():
        encoder = SentenceEncoder.from_pretrained(tmp_path / "e")
        encoder.model = student
        return float((encoder.encode(SENTENCES) - wanted).square().sum(-1).mean()), encoder

    before, _ = distance()
    collate = teacher.tokenizer.pad
    DistillationTrainer(
        student, args, teacher=teacher.model, distillation=config, train_dataset=rows,
        data_collator=lambda chosen: collate(chosen, return_tensors="pt"),
    ).train()  # fmt: skip
    after, encoder = distance()
    assert after < before / 3
    encoder.save_pretrained(tmp_path / "student")
    again = SentenceEncoder.from_pretrained(tmp_path / "student")
    assert again.model.config.num_hidden_layers == 1
    torch.testing.assert_close(again.encode(SENTENCES), encoder.encode(SENTENCES))


def test_what_is_not_supported_is_refused(tmp_path):
    with pytest.raises(LmcompressError, match="no folder of sentence-transformers, which has a modules.json"):
        SentenceEncoder.from_pretrained(tmp_path)
    with pytest.raises(LmcompressError, match="pools by lasttoken; supported is one of mean, cls, max"):
        SentenceEncoder.from_pretrained(write_encoder(tmp_path / "last", pooling="lasttoken"))
    with pytest.raises(LmcompressError, match="is a Dense with the activation Tanh; supported are linear ones"):
        SentenceEncoder.from_pretrained(write_encoder(tmp_path / "tanh", dense="activation.Tanh"))
    stranger = write_encoder(tmp_path / "stranger")
    config = json.loads((stranger / "config.json").read_text())
    BertModel(BertConfig.from_dict(config | {"vocab_size": 10})).save_pretrained(stranger)
    with pytest.raises(
        LmcompressError, match="has embeddings of 10 tokens and a tokenizer of 64: the tokenizer is anot"
    ):
        SentenceEncoder.from_pretrained(stranger)
    folder = write_encoder(tmp_path / "other")
    with pytest.raises(LmcompressError, match="sentences must be a list of strings, at least one"):
        SentenceEncoder.from_pretrained(folder).encode([])
    modules = json.loads((folder / "modules.json").read_text())
    for broken, message in [
        ([*modules, {**modules[2], "idx": 3, "type": "x.LSTM"}], "has the modules LSTM, known are Transformer, Pool"),
        ([modules[0], modules[2]], "must begin with a Transformer and a Pooling, got Transformer, Normalize"),
        ([modules[0], modules[1], modules[2], {**modules[2], "idx": 3}], "must normalize last, got"),
    ]:
        (folder / "modules.json").write_text(json.dumps(broken))
        with pytest.raises(LmcompressError, match=message):
            SentenceEncoder.from_pretrained(folder)
    (folder / "modules.json").write_text("[")
    with pytest.raises(CheckpointError, match="modules.json is no JSON"):
        SentenceEncoder.from_pretrained(folder)
