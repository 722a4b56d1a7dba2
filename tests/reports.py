"""Reports of numbers that are known, in the states that a page must show."""

from __future__ import annotations

import numpy as np

from lmcompress.reporting.evidence import encode

ROWS = 400


def row(name, role, score, size, ms, verdict="baseline", metric="accuracy", **more):
    """A row as reports have had it from the first version on."""
    median, speedup = ms, float(verdict.split("x")[0]) if verdict[0].isdigit() else 1.0
    return {
        "name": name,
        "role": role,
        "folder": f"runs/{name}",
        "metrics": {"validation": {metric: score}},
        "parameters": 1000,
        "size_bytes": size,
        "weights_bytes": size,
        "equivalence": {"max_error": 0.0},
        "format": "native",
        "training": {"steps": 3, "seconds": 1.0, "resumed": False},
        "latency": [
            {
                "model": name,
                "batch_size": 1,
                "median_ms": median,
                "lower_ms": 0.98 * median,
                "upper_ms": 1.02 * median,
                "sequence_length": 32,
                "speedup_vs_first": speedup,
                "verdict": verdict,
            }
        ],
    } | more


def plain_report():
    """Teacher and student, with nothing that later versions have added."""
    return {
        "recipe": "tiny",
        "description": "d",
        "paper": None,
        "task": "t",
        "kind": "classification",
        "metric": "accuracy",
        "lower_is_better": False,
        "split": "validation",
        "reference": "teacher",
        "created": "2026-01-02T03:04:05",
        "seed": 0,
        "machine": {"processor": "p", "cores": 2, "threads": 2, "gpu": None},
        "versions": {"torch": "2"},
        "rows": [
            row("teacher", "teacher", 0.8, 2_000_000, 4.0),
            row("student", "student", 0.6, 500_000, 2.0, "2.00x faster"),
        ],
        "notes": ["a note"],
    }


def with_predictions(report, right):
    """The same, where each model has so many of 400 rows right: the first ones, but for a shift."""
    report["evidence"] = {"validation": {"labels": encode(np.ones(ROWS, dtype=int))}}
    report["chance"] = {"validation": {"accuracy": 0.5}}
    for entry in report["rows"]:
        count, shift = right[entry["name"]]
        said = np.roll(np.arange(ROWS) < count, shift)
        entry["evidence"] = {"validation": {"predictions": encode(said.astype(int))}}
        entry["metrics"]["validation"]["accuracy"] = count / ROWS
    return report


def full_report():
    """A teacher, a student with its control, a pruned and a quantized model, with everything that a page shows."""
    report = plain_report()
    log = [
        {
            "step": step,
            "loss": 3.0 / step,
            "loss_label": 1.0 / step,
            "loss_kd": 1.5 / step,
            "loss_hidden_mse_0": 0.5 / step,
        }
        for step in (10, 20, 30)
    ]
    trained = {"steps": 30, "seconds": 2.0, "resumed": False, "last_log": log[-1]}
    plain = [{"step": step, "loss": 1.0 / step} for step in (10, 20, 30)]
    blocks = {"hidden_size": 16, "head_size": 4, "blocks": [{"heads": 4, "ffn": 64}] * 3}
    modules = [
        {"path": "embeddings.word_embeddings", "part": "embeddings", "block": None, "bytes": 300_000},
        {"path": "encoder.layer.0.intermediate.dense", "part": "feed-forward", "block": 0, "bytes": 100_000},
        {"path": "tokenizer, config, headers", "part": "other", "block": None, "bytes": 100_000},
    ]
    student = {"training": trained, "log": log, "modules": modules, "parameters": 400}
    report["rows"] = [
        row("teacher", "teacher", 0.0, 2_000_000, 4.0, log=plain, modules=modules, **blocks),
        row("student", "student", 0.0, 500_000, 2.0, "2.00x faster", **student),
        row("student-control", "control", 0.0, 500_000, 2.0, "2.00x faster", log=plain, parameters=400),
        row("pruned", "pruned", 0.0, 900_000, 3.0, "1.33x faster", pruning=pruning(), modules=modules, parameters=700),
        row("int4", "quantized", 0.0, 400_000, 6.0, "0.67x: slower", quantization=quantization(), modules=modules),
    ]
    right = {
        "teacher": (360, 0),
        "student": (358, 1),
        "student-control": (320, 0),
        "pruned": (359, 0),
        "int4": (340, 0),
    }
    report["paper"] = "Hinton et al. 2015, https://arxiv.org/abs/1503.02531; Esser et al. 2020"
    report["latency"] = {"repeats": 20, "load_before": 0.5, "load_after": 0.7}
    return with_predictions(report, right)


def pruning():
    """What pruning says of three blocks: the second has lost all heads, the third is gone."""
    return {
        "before": {"blocks": [{"heads": 4, "ffn": 64}] * 3},
        "after": {"blocks": [{"heads": 2, "ffn": 40, "source": 0}, {"heads": 0, "ffn": 8, "source": 1}]},
        "kept_heads": [[0, 3], [], []],
        "removed": 0.6,
        "asked": 0.59,
        "unit": "parameters",
        "masked_error": 2e-7,
        "stock": {"loads": False, "reason": "every block needs <all> heads"},
        "coverage": {"parameters": {"cut": 0.3}, "block_parameters": {"cut": 0.6}},
        "method": {"criterion": "fisher", "ranking": "global", "schedule": {"kind": "gradual", "end": 0.5}},
    }


def quantization():
    """Two matrices of a block in unlike bits, and the embeddings."""
    matrices = [
        ("encoder.layer.0.attention.self.query", "query", 4, 256),
        ("encoder.layer.0.intermediate.dense", "ffn_in", 8, 1024),
        ("embeddings.word_embeddings", "embeddings", 4, 4000),
    ]
    return {
        "method": "rtn",
        "config": {},
        "dense": {"pooler.dense": "outside of the blocks"},
        "matrices": [
            {"path": path, "part": part, "bits": bits, "weights": n, "bytes_after": n * bits // 8 + 4, "inputs": None}
            for path, part, bits, n in matrices
        ],
    }


def language_model():
    """Two language models, measured in windows."""
    report = plain_report() | {"kind": "causal_lm", "metric": "token_perplexity", "lower_is_better": True}
    report["chance"] = {"validation": {"token_perplexity": 300.0}}
    report["evidence"] = {"validation": {}}
    tokens = np.full(60, 31)
    for index, entry in enumerate(report["rows"]):
        nll = np.random.default_rng(0).normal(93.0, 5.0, 60) * (1 + 0.02 * index)
        entry["metrics"] = {"validation": {"token_perplexity": float(np.exp(nll.sum() / tokens.sum()))}}
        entry["evidence"] = {"validation": {"nll": encode(nll), "tokens": encode(tokens)}}
    return report
