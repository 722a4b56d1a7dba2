"""Tables of the pages are the results."""

import pytest
from doc_pages import PAGES, write_results


def test_the_tables_of_all_pages_are_the_results(tables):
    differ = [page for page in tables.PAGES if tables.fill(page.read_text("utf-8")) != page.read_text("utf-8")]
    assert differ == [], "run: python benchmarks/tables.py"


def test_no_table_is_on_a_page_that_is_not_made_anew(tables):
    assert {page for page in PAGES if "<!-- table:" in page.read_text("utf-8")} <= set(tables.PAGES)


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


def test_a_table_without_results_says_so(tables, tmp_path):
    page = "a\n<!-- table:distillation -->\nold\n<!-- /table -->\nb\n"
    filled = tables.fill(page, tmp_path)
    assert filled == "a\n<!-- table:distillation -->\n_Not measured yet._\n<!-- /table -->\nb\n"
    assert tables.fill(filled, tmp_path) == filled


def test_an_unknown_table_is_refused(tables, tmp_path):
    with pytest.raises(SystemExit, match="no table 'x'; there are: headline"):
        tables.fill("<!-- table:x -->\n<!-- /table -->\n", tmp_path)


def test_the_distillation_table_has_teacher_student_control_and_the_mean_without_cola(tables, tmp_path):
    def row(task, role, score, seeds=3):
        spread = None if role == "teacher" else 0.25
        sizes = dict(parameters=2_000_000, bytes=8_000_000)
        return dict(task=task, role=role, score=score, spread=spread, seeds=seeds, of_teacher=score, **sizes)

    scores = {"rte": (80.0, 76.0, 70.0), "mrpc": (90.0, 86.0, 84.0), "cola": (50.0, 30.0, 20.0)}
    roles = ("teacher", "distilled", "control")
    rows = [row(task, role, score) for task, three in scores.items() for role, score in zip(roles, three, strict=True)]
    write_results(tmp_path, "distillation", rows, [dict(name="kept", target=">= 97 %", measured=95.0, met=False)])
    table = tables.TABLES["distillation"](tmp_path)
    assert "| RTE | 80.0 | 76.0 ± 0.2 | 70.0 ± 0.2 | 76.0 % | 70.0 % |" in table
    assert "| **mean without CoLA** | **85.0** | **81.0** | **77.0** | **95.3 %** | **90.6 %** |" in table
    assert "| distillation: kept | >= 97 % | 95 | **no** |" in tables.asked(tmp_path)


def test_the_table_of_language_models_averages_over_seeds(tables, tmp_path):
    sizes = dict(parameters=2_000_000, bytes=8_000_000)
    rows = [dict(role="teacher", token_perplexity=40.0, word_perplexity=60.0, **sizes)]
    rows += [dict(role="distilled", token_perplexity=50.0 + i, word_perplexity=70.0 + i, **sizes) for i in (0, 2)]
    machine = dict(processor="P", cores=2, gpu="G", torch="2", transformers="5")
    write_results(tmp_path, "distillation_lm", rows, machine=machine)
    table = tables.TABLES["distillation_lm"](tmp_path)
    assert "| half of its layers, distilled | 51.0 | 71.0 | 2.0 M | 8.0 MB |" in table
    assert table.endswith("Means of 2 seeds. `python x`, d, commit c; G; torch 2, transformers 5.")


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({}, "P, 2 cores (instruction sets not recorded); torch"),
        ({"instructions": None}, "P, 2 cores (instruction sets not recorded); torch"),
        ({"instructions": "avx2, avx512_vnni"}, "P, 2 cores (avx2, avx512_vnni); torch"),
        ({"instructions": ""}, "P, 2 cores (without avx2); torch"),
        ({"gpu": "G"}, "; G; torch"),
    ],
)
def test_a_table_names_the_instruction_sets_of_the_processor(tables, tmp_path, known, said):
    sizes = dict(parameters=2_000_000, bytes=8_000_000)
    rows = [dict(role="teacher", token_perplexity=40.0, word_perplexity=60.0, **sizes)]
    machine = dict(processor="P", cores=2, gpu=None, torch="2", transformers="5") | known
    write_results(tmp_path, "distillation_lm", rows, machine=machine)
    assert said in tables.TABLES["distillation_lm"](tmp_path)


def test_a_number_of_a_busy_machine_has_no_verdict_and_is_not_counted(tables, tmp_path):
    items = [dict(name=n, target="<= 1", measured=0.5, met=met) for n, met in (("a", True), ("b", None), ("c", False))]
    write_results(tmp_path, "x", [], items)
    table = tables.asked(tmp_path)
    assert "| x: b | <= 1 | 0.5 | no verdict: busy |" in table
    assert table.endswith(
        "1 of 2 targets are met. Of 1 there is no verdict: the machine was busy when they were measured."
    )


def timed(method, ratio, *, kind="other", threads=1, busy=False):
    """A row of MiniLM at 1 x 128."""
    place = dict(question="encoder", model="MiniLM", batch=1, length=128, method=method, kind=kind, threads=threads)
    times = dict(ms=20.0 / ratio, cpu_ms=40.0 / ratio, speedup=ratio, speedup_quartiles=[ratio - 0.1, ratio + 0.1])
    return place | times | dict(busy=busy, clock="cpu" if threads == 1 else "wall", deviation=0.25)


def test_times_are_shown_with_cpu_time_quartiles_and_the_first_again(tables, tmp_path):
    rows = [timed("fp32", 1.0, kind="first"), timed("fp32, again", 1.02, kind="again"), timed("bf16", 2.0)]
    write_results(tmp_path, "quant_speed", [*rows, timed("fp32", 1.0, threads=2, busy=True)], setting={"peers": {}})
    table = tables.TABLES["quant_speed"](tmp_path)
    assert "| encoder, 1 thread | MiniLM, 1 × 128 | over fp32 |" in table
    assert "| bf16 | 20.0 ms CPU, 10.0 ms | 2.00 (1.90 – 2.10) × |" in table
    assert "| fp32, again | 39.2 ms CPU, 19.6 ms | 1.02 (0.92 – 1.12) × |" in table
    assert "| encoder, 2 threads |" in table and "| bf16 | 0.2500 |" in table
    assert "**The machine was busy, no verdict: MiniLM, 1 × 128, 2 threads.**" in table
