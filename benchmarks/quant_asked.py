"""What was asked of the speed and memory of packed models, beside what came: the last part of ``quant_speed.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from common import asked
from speeds import on

Row = Mapping[str, Any]

LENGTH = 128
# times as fast as fp32, by shape and batch size: eager and compiled
STATIC_ASKED = {
    ("BERT-base", 1): (5.0, 6.0),
    ("BERT-base", 32): (4.5, 5.5),
    ("MiniLM", 1): (3.8, 4.0),
    ("MiniLM", 32): (4.2, 4.9),
}
BY_TOKEN_ASKED = {("MiniLM", 1): 3.3, ("MiniLM", 32): 3.4}
# of the time by token over that by tensor, of the resident memory of 4 bits over that of fp32
BY_TOKEN_COST, MEMORY_ASKED = 1.05, 0.30
DECODING_ASKED = {1: 3.5, 8: 4.2}
# the speed and the deviation of our export over those of nncf's int8, by batch size
NNCF_SPEED, NNCF_DEVIATION = {1: 0.95, 32: 0.88}, 0.25
STATIC, BY_TOKEN = "lmcompress W8A8, static", "lmcompress W8A8, by token"
PEERS = ("bf16", "bf16, compiled", "torch dynamic int8", "torchao int8 dynamic", "ONNX Runtime dynamic int8")


def verdicts(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """All that was asked for."""
    places: dict[tuple[str, str, int, int], dict[str, Row]] = {}
    wanted = []
    for row in rows:
        if "speedup" in row:
            key = (row["question"], row["model"], row.get("asked_batch", row["batch"]), row["threads"])
            places.setdefault(key, {})[row["method"]] = row
        elif row["question"] == "memory" and row["method"] == "lmcompress W4A8" and row["memory"] == "low":
            name = "resident memory of the 4-bit GPT-2 small shape over fp32's, memory='low'"
            wanted.append(asked(name, f"<= {MEMORY_ASKED}", row["of_fp32"], row["of_fp32"] <= MEMORY_ASKED))
    for (question, model, batch, threads), found in places.items():
        if question == "encoder":
            where = f"{model} shape, {batch} x {LENGTH}, {on(threads)}"
            wanted += _encoder(found, where, model, batch)
        else:
            where = f"{model} shape, decoding at batch {batch}, {on(threads)}"
            wanted += _times(found, f"W8A8 {where}, over fp32", ["lmcompress W8A8", BY_TOKEN], DECODING_ASKED[batch])
    return wanted


def _encoder(found: Mapping[str, Row], where: str, model: str, batch: int) -> list[dict[str, Any]]:
    wanted = []
    for way, least in zip(("", ", compiled"), STATIC_ASKED[model, batch], strict=True):
        names = [f"{STATIC}{rest}{way}" for rest in ("", ", bf16 rest")]
        wanted += _times(found, f"W8A8{way}, static ranges, {where}, over fp32", names, least)
    names = [f"{BY_TOKEN}{rest}" for rest in ("", ", bf16 rest")]
    if least := BY_TOKEN_ASKED.get((model, batch)):
        wanted += _times(found, f"W8A8, ranges by token, {where}, over fp32", names, least)
    wanted += _above(found, f"W8A8, {where}", [name for name in found if name.startswith("lmcompress W8A8")])
    wanted += _by_token(found, where)
    return wanted + _nncf(found, where, batch)


def _times(found: Mapping[str, Row], name: str, methods: Iterable[str], least: float) -> list[dict[str, Any]]:
    """The faster of several rows."""
    mine = [found[method] for method in methods if method in found]
    if not mine:
        return []
    best = max(mine, key=lambda row: row["speedup"])
    return [asked(name, f">= {least}", best["speedup"], best["speedup"] >= least, busy=best["busy"])]


def _above(found: Mapping[str, Row], name: str, methods: Iterable[str]) -> list[dict[str, Any]]:
    """The fastest of ours over the fastest of the peers; met if the quartiles of the two lie apart."""
    mine = [found[method] for method in methods]
    theirs = [found[method] for method in PEERS if method in found]
    if not mine or not theirs:
        return []
    best, peer = (max(rows, key=lambda row: row["speedup"]) for rows in (mine, theirs))
    name = f"{name}: fastest ({best['method'].removeprefix('lmcompress ')}) over the fastest peer ({peer['method']})"
    apart = best["speedup_quartiles"][0] > peer["speedup_quartiles"][1]
    return [asked(name, "> 1, quartiles apart", best["speedup"] / peer["speedup"], apart, busy=best["busy"])]


def _by_token(found: Mapping[str, Row], where: str) -> list[dict[str, Any]]:
    tensor, token = found.get("lmcompress W8A8"), found.get(BY_TOKEN)
    if tensor is None or token is None:
        return []
    ratio = tensor["speedup"] / token["speedup"]
    name = f"W8A8, {where}: time with ranges by token over that by tensor"
    return [asked(name, f"<= {BY_TOKEN_COST}", ratio, ratio <= BY_TOKEN_COST, busy=token["busy"])]


def _nncf(found: Mapping[str, Row], where: str, batch: int) -> list[dict[str, Any]]:
    wanted = []
    for rest in ("fp32 rest", "bf16 rest"):
        ours, theirs = found.get(f"OpenVINO, our export, {rest}"), found.get(f"OpenVINO int8 by nncf, {rest}")
        if ours is None or theirs is None:
            continue
        name, least = f"OpenVINO, our export over nncf's int8, {rest}, {where}", NNCF_SPEED[batch]
        speed, deviation = ours["speedup"] / theirs["speedup"], ours["deviation"] / theirs["deviation"]
        wanted.append(asked(f"{name}: speed", f">= {least}", speed, speed >= least, busy=ours["busy"]))
        met = deviation <= NNCF_DEVIATION
        wanted.append(asked(f"{name}: deviation", f"<= {NNCF_DEVIATION}", deviation, met))
    return wanted
