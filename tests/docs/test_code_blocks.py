"""The Python and YAML of the README and the docs run, and the README is short."""

import sys
import textwrap
import types

import pytest
import transformers
from doc_pages import ROOT, blocks, name_of, with_language
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lmcompress import CompressedModel
from lmcompress.data import load_task, train_tokenizer
from lmcompress.quantization import POST_TRAINING, quantize
from lmcompress.recipes import parse_recipe


def _save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A folder as the quickstarts leave it, but for the models, which are tiny and know nothing."""
    folder = tmp_path_factory.mktemp("work")
    data = load_task("embedded/clinc150")
    tokenizer = train_tokenizer(data.train["text"][:2000], kind="wordpiece", vocab_size=600)
    tokenizer.model_max_length = 64
    shape = dict(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, vocab_size=len(tokenizer)
    )
    labels = dict(id2label=data.task.id2label, label2id=data.task.label2id, problem_type=data.task.problem_type)
    config = BertConfig(**shape, **labels, max_position_embeddings=64)
    teacher = BertForSequenceClassification(config)
    _save(teacher, tokenizer, folder / "runs" / "quickstart" / "teacher")
    quantize(teacher, POST_TRAINING, [tokenizer(["a text"], return_tensors="pt")], progress=False)
    CompressedModel(teacher).save_pretrained(folder / "small", tokenizer=tokenizer)
    texts = load_task("embedded/inaugural").train["text"][:3]
    tokenizer = train_tokenizer(texts, kind="bytelevel_bpe", vocab_size=400)
    tokenizer.model_max_length = 64
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=64, vocab_size=len(tokenizer), **ids)
    _save(GPT2LMHeadModel(config), tokenizer, folder / "runs" / "lm" / "teacher")
    return folder


# TrainingArguments pin memory unless told not to; torch says so on machines without a GPU
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("page", with_language("python"), ids=name_of)
def test_the_python_of_a_page_runs(page, teachers, monkeypatch, capsys):
    monkeypatch.chdir(teachers)
    monkeypatch.setattr(transformers.Trainer, "log", lambda *_, **__: None)
    script = types.ModuleType("__main__")
    # where a part that is saved by its name is found again
    monkeypatch.setitem(sys.modules, "__main__", script)
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page.name}, Python block {number}", "exec"), vars(script))


def test_the_readme_fits_one_sitting():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 9 * 1024


def test_the_first_python_of_the_readme_is_short_and_distils():
    first = blocks(ROOT / "README.md", "python")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 15
    assert "DistillationTrainer(" in first and ".train()" in first


MY_MODULE = """
from lmcompress.distillation import LogitLoss
from lmcompress.pruning import Criterion

my_criterion = Criterion("spread", "weights", ("heads", "neurons"), lambda group: group.std(dim=1))
my_loss = LogitLoss("gaps", lambda student, teacher, **how: (student - teacher).square().sum(dim=-1))
"""


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    """What the docs call a package of one's own, in the folder that a command is run from."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_module.py").write_text(MY_MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_package", "my_package.my_module"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("my_package")
@pytest.mark.parametrize("page", with_language("yaml"), ids=name_of)
def test_the_yaml_of_a_page_is_of_valid_recipes(page):
    whole = "name: a\nmodel: m\ntask: {name: t}\nstages:\n- name: teacher\n- name: student\n"
    for code in blocks(page, "yaml"):
        parse_recipe(code if code.startswith("name:") else whole + textwrap.indent(code, "  "))
