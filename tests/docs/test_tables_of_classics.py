"""Tables of the papers whose experiments are repeated."""

import pytest
from doc_pages import ROOT, write_results


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
        write_results(tmp_path, name, rows, wanted, setting=dict(groups=4, teachers={"mrpc": 84.0}))
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
    assert table.endswith(
        "One seed. `python x`, d, commit c; P, 2 cores (instruction sets not recorded); torch 2, transformers 5."
    )


def test_errors_of_several_seeds_have_a_spread(tables, tmp_path):
    write_results(
        tmp_path, "hinton", [dict(name="labels", units=[8], errors=102, each=[100, 104], seeds=2, published=146)]
    )
    assert "| labels | 8 | 102 ± 3 | 146 |" in tables.TABLES["hinton"](tmp_path)


def test_the_curves_are_shown_where_they_were_drawn(tables, seeds):
    assert "![" not in tables.TABLES["obd"](seeds)
    (seeds / "obd.svg").touch()
    assert tables.TABLES["obd"](seeds).endswith("](../../benchmarks/results/obd.svg)")


def test_published_and_measured_numbers_stand_side_by_side(tables, seeds):
    table = tables.TABLES["seeds"](seeds)
    assert len(table.splitlines()) == 2 + len(tables.classics.SEEDS)
    for cells in (
        "| magnitude → obd: errors with 80 % removed, MNIST (asked is the loss) | – | lenet-5: 1.20 → 0.93 % |",
        "| labels → soft targets: errors, MNIST | 1.46 → 0.74 % | 1.50 → 0.75 % | **no**, 1 of 2 |",
        "lenet-5: 0.80 → 0.74 %, 39 × | lenet-5: 0.80 → 0.75 %, 40 × |",
        "| – | MRPC: 80.00 → 81.00 % |",
    ):
        assert cells in table
    (seeds / "obd.json").unlink()
    assert "| – | _not measured yet_ | – |" in tables.TABLES["seeds"](seeds)


def test_seeds_have_benchmarks(tables, tmp_path):
    scripts = {file.stem for file in (ROOT / "benchmarks" / "seeds").glob("*.py")} - {"mnist", "stages"}
    assert scripts == tables.classics.SEEDS.keys()
    assert tables.TABLES["seeds"](tmp_path) is None
    assert tables.classics.published_numbers("obd") == {}
    assert tables.classics.published_numbers("hinton") == {"teacher": 67, "labels": 146, "soft targets": 74}
