"""What the README and the guides say is true: code runs, commands exist, links lead somewhere, tables are results."""

import importlib.util
import json
import pydoc
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import transformers
import typer
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import lmcompress
from lmcompress.cli import app
from lmcompress.data import load_task, train_tokenizer
from lmcompress.recipes import builtin_recipes, parse_recipe

ROOT = Path(lmcompress.__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """Code of a page in one language; ``no-run`` after the language marks what needs the Hub, a GPU or hours."""
    found = [(info.split(), code) for info, code in FENCE.findall(page.read_text("utf-8"))]
    return [code for words, code in found if words[:1] == [language] and "no-run" not in words]


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
    _save(BertForSequenceClassification(config), tokenizer, folder / "runs" / "quickstart" / "teacher")
    texts = load_task("embedded/inaugural").train["text"][:3]
    tokenizer = train_tokenizer(texts, kind="bytelevel_bpe", vocab_size=400)
    tokenizer.model_max_length = 64
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=64, vocab_size=len(tokenizer), **ids)
    _save(GPT2LMHeadModel(config), tokenizer, folder / "runs" / "lm" / "teacher")
    return folder


def _pages_with(language):
    return [page for page in PAGES if blocks(page, language)]


# TrainingArguments pin memory unless told not to; torch says so on machines without a GPU
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("page", _pages_with("python"), ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, teachers, monkeypatch, capsys):
    monkeypatch.chdir(teachers)
    monkeypatch.setattr(transformers.Trainer, "log", lambda *_, **__: None)
    namespace = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page.name}, Python block {number}", "exec"), namespace)


def test_the_first_python_of_the_readme_is_short_and_distils():
    first = blocks(ROOT / "README.md", "python")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 15
    assert "DistillationTrainer(" in first and ".train()" in first


def _commands():
    """Every command line of lmcompress on any page, and the page."""
    for page in PAGES:
        for code in blocks(page, "bash"):
            for line in code.replace("\\\n", " ").splitlines():
                for part in line.partition("  #")[0].split("&&"):
                    if part.split()[:1] == ["lmcompress"]:
                        yield pytest.param(part.partition(">")[0].strip(), id=f"{page.name}: {part.strip()}")


@pytest.mark.parametrize("command", list(_commands()))
def test_a_command_line_is_one_that_lmcompress_takes(command):
    group, arguments, context = typer.main.get_command(app), shlex.split(command)[1:], None
    while hasattr(group, "resolve_command"):
        context = group.make_context(group.name, list(arguments), parent=context, resilient_parsing=False)
        _, group, arguments = group.resolve_command(context, [*context._protected_args, *context.args])
        assert group is not None
    # parses, and calls nothing
    group.make_context(group.name, list(arguments), parent=context)
    if group.name in ("run", "show") and "." not in arguments[0]:
        assert arguments[0] in builtin_recipes()


@pytest.mark.parametrize("page", _pages_with("yaml"), ids=lambda page: page.name)
def test_the_yaml_of_a_page_is_of_valid_recipes(page):
    whole = "name: a\nmodel: m\ntask: {name: t}\nstages:\n- name: teacher\n- name: student\n"
    for code in blocks(page, "yaml"):
        parse_recipe(code if code.startswith("name:") else whole + textwrap.indent(code, "  "))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    text = FENCE.sub("", page.read_text("utf-8"))
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


def test_ci_installs_and_tests_in_the_words_of_the_readme():
    (command,) = [code.strip() for code in blocks(ROOT / "README.md", "bash") if '".[test]"' in code]
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    install, test = command.split(" && ")
    assert f"\n{install}\n" in script and f"\n{test} | tee" in script


def test_constraints_pin_everything_that_pyproject_names():
    tomllib = pytest.importorskip("tomllib")  # in Python from 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["test"],
        *project["optional-dependencies"]["emd"],
    ]
    names = {re.split(r"[<>=!~ \[]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    assert names - pinned == set()


def test_papers_name_modules_and_functions_that_exist():
    text = (ROOT / "docs" / "papers.md").read_text("utf-8")
    named = set(re.findall(r"`(lmcompress(?:\.\w+)+)`", text))
    assert len(named) > 20
    assert [name for name in sorted(named) if pydoc.locate(name) is None] == []


def test_papers_name_every_built_in_recipe():
    text = (ROOT / "docs" / "papers.md").read_text("utf-8")
    assert [name for name in builtin_recipes() if f"`{name}`" not in text] == []


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/papers.md"])
def test_the_tables_of_a_page_are_the_results(tables, page):
    assert ROOT / page in tables.PAGES
    text = (ROOT / page).read_text("utf-8")
    assert tables.fill(text) == text, "run: python benchmarks/tables.py"


def test_every_table_has_its_place(tables):
    text = "".join(page.read_text("utf-8") for page in tables.PAGES)
    assert [name for name in tables.TABLES if f"<!-- table:{name} -->" not in text] == []


def test_check_writes_nothing_and_names_the_pages_that_differ(tables, tmp_path, monkeypatch):
    pages = [tmp_path / name for name in ("a.md", "b.md")]
    for page in pages:
        page.write_text("<!-- table:hinton -->\nold\n<!-- /table -->\n")
    command = ["tables.py", "--results", str(tmp_path), "--page", *map(str, pages)]
    monkeypatch.setattr("sys.argv", [*command, "--check"])
    with pytest.raises(SystemExit, match=r"(?s)a\.md.*b\.md.*run: python benchmarks/tables\.py"):
        tables.main()
    assert "old" in pages[1].read_text()
    monkeypatch.setattr("sys.argv", command)
    tables.main()
    assert all("_Not measured yet._" in page.read_text() for page in pages)


def _write(folder, name, rows, asked=(), **more):
    """Results as benchmarks write them."""
    machine = dict(processor="P", cores=2, gpu=None, torch="2", transformers="5")
    about = dict(benchmark=name, command="python x", date="d", commit="c", machine=machine)
    (folder / f"{name}.json").write_text(json.dumps(about | dict(rows=rows, asked=list(asked)) | more))


def test_a_table_without_results_says_so(tables, tmp_path):
    page = "a\n<!-- table:distillation -->\nold\n<!-- /table -->\nb\n"
    filled = tables.fill(page, tmp_path)
    assert filled == "a\n<!-- table:distillation -->\n_Not measured yet._\n<!-- /table -->\nb\n"
    assert tables.fill(filled, tmp_path) == filled


def test_an_unknown_table_is_refused(tables, tmp_path):
    with pytest.raises(SystemExit, match="no table 'x'; there are: distillation"):
        tables.fill("<!-- table:x -->\n<!-- /table -->\n", tmp_path)


def test_the_distillation_table_has_teacher_student_control_and_the_mean_without_cola(tables, tmp_path):
    def row(task, role, score, seeds=3):
        spread = None if role == "teacher" else 0.25
        sizes = dict(parameters=2_000_000, bytes=8_000_000)
        return dict(task=task, role=role, score=score, spread=spread, seeds=seeds, of_teacher=score, **sizes)

    scores = {"rte": (80.0, 76.0, 70.0), "mrpc": (90.0, 86.0, 84.0), "cola": (50.0, 30.0, 20.0)}
    roles = ("teacher", "distilled", "control")
    rows = [row(task, role, score) for task, three in scores.items() for role, score in zip(roles, three, strict=True)]
    _write(tmp_path, "distillation", rows, [dict(name="kept", target=">= 97 %", measured=95.0, met=False)])
    table = tables.distillation(tmp_path)
    assert "| RTE | 80.0 | 76.0 ± 0.2 | 70.0 ± 0.2 | 76.0 % | 70.0 % |" in table
    assert "| **mean without CoLA** | **85.0** | **81.0** | **77.0** | **95.3 %** | **90.6 %** |" in table
    assert "| distillation: kept | >= 97 % | 95 | **no** |" in tables.asked(tmp_path)


def test_the_table_of_language_models_averages_over_seeds(tables, tmp_path):
    sizes = dict(parameters=2_000_000, bytes=8_000_000)
    rows = [dict(role="teacher", token_perplexity=40.0, word_perplexity=60.0, **sizes)]
    rows += [dict(role="distilled", token_perplexity=50.0 + i, word_perplexity=70.0 + i, **sizes) for i in (0, 2)]
    machine = dict(processor="P", cores=2, gpu="G", torch="2", transformers="5")
    _write(tmp_path, "distillation_lm", rows, machine=machine)
    table = tables.distillation_lm(tmp_path)
    assert "| half of its layers, distilled | 51.0 | 71.0 | 2.0 M | 8.0 MB |" in table
    assert table.endswith("Means of 2 seeds. `python x`, d, commit c; G; torch 2, transformers 5.")


def _on_mnist(key, value, errors, **more):
    return {"network": "lenet-5", key: value, "errors": errors, "each": [errors], "seeds": 1} | more


def _on_glue(key, value, score, task="mrpc", **more):
    return {"task": task, key: value, "score": score, "spread": None, "seeds": 1} | more


def _rows_of_seeds():
    """Some rows of every seed's results."""
    narrow = dict(network="lenet-5", widths=[5, 19, 500], left=1234)
    halves = dict(removed=[0.0, 0.5, 0.7, 0.8, 0.9], losses=[0.1, 0.2, 0.3, 0.4, 0.5])
    return {
        "obd": [
            _on_mnist("criterion", "obd", [90, 91, 92, 93, 94], **halves),
            _on_mnist("criterion", "magnitude", [90, 91, 92, 120, 94], **halves),
        ],
        "hinton": [
            dict(name=name, units=[800, 800], errors=errors, each=[errors], seeds=1, published=146)
            for name, errors in (("labels", 150), ("soft targets", 75))
        ],
        "deep_compression": [
            _on_mnist("stage", "dense", 80, bytes=400_000, ratio=1.0),
            _on_mnist("stage", "coded", 75, bytes=10_000, ratio=40.0),
        ],
        "network_surgery": [
            _on_mnist("role", "dense", 95, factor=1.0),
            _on_mnist("role", "surgery", 92, factor=108.9),
            _on_mnist("role", "without splicing", 99, factor=108.9),
        ],
        "iht": [
            _on_mnist("role", "dense", 80, sparsity=0.0),
            _on_mnist("role", "iht", 78, sparsity=0.75),
            {"network": "bert-mrpc", "role": "iht", "score": 84.25, "each": [84.25], "seeds": 1, "sparsity": 0.75},
        ],
        "structured_sparsity": [_on_mnist("role", role, 85) | narrow for role in ("dense", "group lasso")],
        "attention_transfer": [_on_glue("role", "labels", 70.0), _on_glue("role", "labels + AT", 71.0)],
        "grouped": [
            _on_glue("shuffle", shuffle, score, share_of_products=0.25)
            for shuffle, score in (("none", 80), ("channel", 81))
        ],
        "deep_compression_bert": [
            _on_glue("stage", "coded", 88.54, task="sst2", bytes=7_000_000, ratio=12.5, sparsity=None, seed=0)
        ],
    }


@pytest.fixture
def seeds(tmp_path):
    """Results of every seed, each with one number that was asked and is not met."""
    for name, rows in _rows_of_seeds().items():
        wanted = [
            dict(name="a", target="<= 1", measured=2, met=False),
            dict(name="b", target="<= 3", measured=2, met=True),
            dict(name="c", target="reported", measured=2, met=True),
        ]
        _write(tmp_path, name, rows, wanted, setting=dict(groups=4, teachers={"mrpc": 84.0}))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("obd", "| lenet-5 | obd | 0.1 | 0.2 | 0.3 | 0.4 | 0.5 |"),
        ("hinton", "| soft targets | 800-800 | 75 | 146 |"),
        ("deep_compression", "| lenet-5 | coded | 75 | 10.0 kB | 40.0 × |"),
        ("deep_compression_bert", "| SST-2 | coded | 88.5 | 7.0 MB | 12.5 × |"),
        ("network_surgery", "| lenet-5 | surgery | 92 | 91 | 108.9 × | 108 × |"),
        ("network_surgery", "| lenet-5 | without splicing | 99 |  | 108.9 × |  |"),
        ("iht", "| lenet-5 | iht | 75 % | 78 |"),
        ("iht", "| bert-mrpc | iht | 75 % | score 84.2 |"),
        ("structured_sparsity", "| lenet-5 | group lasso | 5-19-500 | 1,234 | 85 | 80 |"),
        ("attention_transfer", "| labels + AT | 71.0 |"),
        ("grouped", "| teacher | 84.0 |"),
        ("grouped", "4 groups: 25 % of the products of the matrices. One seed."),
    ],
)
def test_the_tables_of_seeds(tables, seeds, name, row):
    table = tables.TABLES[name](seeds)
    assert row in table
    assert table.endswith("One seed. `python x`, d, commit c; P, 2 cores; torch 2, transformers 5.")


def test_errors_of_several_seeds_have_a_spread(tables, tmp_path):
    _write(tmp_path, "hinton", [dict(name="labels", units=[8], errors=102, each=[100, 104], seeds=2, published=146)])
    assert "| labels | 8 | 102 ± 3 | 146 |" in tables.hinton(tmp_path)


def test_the_curves_are_shown_where_they_were_drawn(tables, seeds):
    assert "![" not in tables.obd(seeds)
    (seeds / "obd.svg").touch()
    assert tables.obd(seeds).endswith("](benchmarks/results/obd.svg)")


def test_published_and_measured_numbers_stand_side_by_side(tables, seeds):
    table = tables.seeds(seeds)
    assert len(table.splitlines()) == 2 + len(tables.SEEDS)
    for cells in (
        "| magnitude → obd: errors with 80 % removed, MNIST (asked is the loss) | – | lenet-5: 1.20 → 0.93 % |",
        "| labels → soft targets: errors, MNIST | 1.46 → 0.74 % | 1.50 → 0.75 % | **no**, 1 of 2 |",
        "lenet-5: 0.80 → 0.74 %, 39 × | lenet-5: 0.80 → 0.75 %, 40 × |",
        "| – | MRPC: 80.00 → 81.00 % |",
    ):
        assert cells in table
    (seeds / "obd.json").unlink()
    assert "| – | _not measured yet_ | – |" in tables.seeds(seeds)


def test_seeds_have_benchmarks(tables, tmp_path):
    scripts = {file.stem for file in (ROOT / "benchmarks" / "seeds").glob("*.py")} - {"mnist", "stages"}
    assert scripts == tables.SEEDS.keys()
    assert tables.seeds(tmp_path) is None
    assert tables.published_numbers("obd") == {}
    assert tables.published_numbers("hinton") == {"teacher": 67, "labels": 146, "soft targets": 74}
