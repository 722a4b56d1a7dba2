"""The result of a run in one sentence, four figures, and supporting statements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from lmcompress.evaluation import BUSY
from lmcompress.reporting.evidence import Interval, difference
from lmcompress.reporting.models import Model, at_chance, chance, control_of
from lmcompress.reporting.wording import (
    Metric,
    Report,
    count,
    megabytes,
    milliseconds,
    rows_text,
    signed,
    times,
)

_NOUNS = {"student": "student", "pruned": "pruned model", "quantized": "quantized model", "control": "control"}
_BAR = 200


def headline(report: Report, models: Sequence[Model], picked: Model) -> Markup:
    """The result in a sentence.

    Args:
        report: report of a run.
        models: its models, the reference first.
        picked: the model it is about.

    Returns:
        The sentence; important parts are emphasized, names are escaped.
    """
    metric, reference = Metric.of(report), models[0]
    if at_chance(report, reference):
        low = [model.name for model in models if at_chance(report, model)]
        who = (
            f"{' and '.join(low)} are"
            if len(low) == 2
            else f"{low[0]} is"
            if len(low) == 1
            else f"{len(low)} models are"
        )
        return Markup("No result: {} at <em class=bad>chance level</em>.").format(who)
    if picked.is_reference:
        return Markup("{} reaches <em>{}</em> {} on {}{}.").format(
            reference.name, metric.text(reference.score), metric.title, report["split"], _in_size(reference)
        )
    subject = _subject(picked)
    if at_chance(report, picked):
        return Markup("{} is at <em class=bad>chance level</em>: nothing of {} is left.").format(
            subject, whose(reference, metric, possessive=True)
        )
    return Markup("{} {} {}{}.").format(
        subject, _quality(metric, reference, picked), _cost(reference, picked), _speed(picked)
    )


def lead(report: Report, models: Sequence[Model], picked: Model) -> Markup:
    """The text below the headline: scores, and the gain from the teacher.

    Args:
        report: report of a run.
        models: its models, the reference first.
        picked: the model that the headline is about.
    """
    metric, reference = Metric.of(report), models[0]
    level = chance(report)
    of = f"{len(reference.units):,} rows of {report['split']}" if reference.units else str(report["split"])
    if report["kind"] == "causal_lm":
        of = str(report["split"])
    score = metric.text(picked.score)
    begin = f"{picked.name} has {metric.title} {score} on {of}"
    if metric.name == "accuracy" and reference.units:
        begin = f"{score} of {len(reference.units):,} rows of {report['split']} are right with {picked.name}"
    told = Markup("{}{}.").format(
        begin, "" if picked.is_reference else f", {metric.text(reference.score)} with {reference.name}"
    )
    if at_chance(report, reference):
        assert level is not None
        why = " Shares of it in other models are meaningless, so no ratios are shown."
        return told + f" A constant prediction scores {metric.text(level)}." + why
    control, worth = _worth(report, models, picked)
    if control is None or worth is None:
        return told
    gain = abs(worth.value)
    amount = f"{100 * gain:.1f}" + (f" ± {100 * worth.half:.1f}" if worth.half else "")
    direction = "worth" if metric.gain(worth.value) >= 0 else "worth minus"
    return told + Markup(
        " The same shape trained as long <b>without</b> the teacher reaches {}: distillation is {} <b>{} {}</b>."
    ).format(metric.text(control.score), direction, amount, metric.unit)


def figures(report: Report, models: Sequence[Model], picked: Model) -> list[dict[str, Any]]:
    """Up to four numbers, each with its reference and its uncertainty.

    Args:
        report: report of a run.
        models: its models, the reference first.
        picked: the model they describe.

    Returns:
        The figures; none at chance level, and none for a single model.
    """
    reference = models[0]
    if picked.is_reference or at_chance(report, reference) or at_chance(report, picked):
        return []
    found = [_kept_figure(Metric.of(report), reference, picked)]
    if picked.size and reference.size:
        ratio = reference.size / picked.size
        relative = f"{times(ratio)} smaller than {megabytes(reference.size)}"
        found.append(
            _figure("size on disk", megabytes(picked.size), relative, "exact: all files needed for loading", 1 / ratio)
        )
    if batch := min(picked.latency, default=0):
        found.append(_latency_figure(reference, picked, batch, str(report["machine"].get("gpu") or "CPU")))
    control, worth = _worth(report, models, picked)
    if control is not None and worth is not None:
        unit = Metric.of(report).unit
        found.append(
            _figure(
                "gain from the teacher" if not report["lower_is_better"] else "change by the teacher",
                f"{signed(worth.value)} {unit}",
                f"over the control’s {Metric.of(report).text(control.score)}",
                _ends(worth),
                None,
            )
        )
    if len(found) < 4:
        share = picked.parameters / reference.parameters
        relative = f"{100 * share:.0f} % of {count(reference.parameters)}"
        found.append(_figure("parameters", count(picked.parameters), relative, "exact", share))
    return found


def speed(model: Model, reference: Model, batch: int) -> Interval:
    """The ratio of two medians, and its bounds according to the quartiles.

    Args:
        model: a timed model.
        reference: the reference; the ratio is above 1 if it is slower.
        batch: batch size.
    """
    median, lower, upper = model.quartiles(batch)
    other, other_lower, other_upper = reference.quartiles(batch)
    return Interval(other / median, other_lower / upper, other_upper / lower)


def speed_text(model: Model, reference: Model, batch: int) -> str:
    """A ratio of latencies in words: a difference only if the interquartile ranges do not overlap.

    Args:
        model: a timed model.
        reference: the reference.
        batch: batch size.

    Returns:
        :data:`~lmcompress.evaluation.speed.BUSY` if the first model differed from itself; empty without latencies.
    """
    if batch not in model.latency or batch not in reference.latency:
        return ""
    if model.latency[batch].get("verdict") == BUSY:
        return BUSY
    found = speed(model, reference, batch)
    if found.low <= 1 <= found.high or f"{found.value:.2f}" == "1.00":
        return "no measurable difference"
    return f"{found.value:.2f}× faster" if found.value > 1 else f"{found.value:.2f}×: slower"


def whose(reference: Model, metric: Metric, *, possessive: bool = False) -> str:
    """The reference's name in the headline.

    Args:
        reference: reference of a report.
        metric: metric that is kept.
        possessive: whether to return only the name, without the metric.
    """
    name = "its teacher" if reference.row["role"] == "teacher" else f"the {reference.name} model"
    return name if possessive else f"{name}’s {metric.title}"


def _subject(model: Model) -> str:
    noun = _NOUNS.get(model.kind, "model")
    plain = model.name in (noun, model.kind, "model")
    return f"The {noun}" if plain else f"The {noun} {model.name}"


def _quality(metric: Metric, reference: Model, picked: Model) -> Markup:
    of = whose(reference, metric)
    change = picked.change.value if picked.change else 0.0
    if metric.lower_is_better:
        if abs(change) < 0.0005:
            return Markup("has <em>{}</em>").format(of)
        side = "above" if change > 0 else "below"
        return Markup("has a {} <em>{} % {}</em> {}’s").format(
            metric.title, f"{100 * abs(change):.1f}", side, whose(reference, metric, possessive=True)
        )
    if reference.score <= 0:
        return Markup("scores <em>{} points</em> against {}").format(signed(change), of)
    kept = picked.score / reference.score
    if kept >= 0.9995:
        return Markup("keeps <em>all</em> of {}").format(of)
    return Markup("keeps <em>{} %</em> of {}").format(f"{100 * kept:.1f}", of)


def _cost(reference: Model, picked: Model) -> Markup:
    share = picked.parameters / reference.parameters
    if picked.size and reference.size and (picked.kind == "quantized" or share > 0.95):
        return Markup("at <em>{} %</em> of its size").format(f"{100 * picked.size / reference.size:.0f}")
    return Markup("at <em>{} %</em> of its parameters").format(f"{100 * share:.0f}")


def _speed(picked: Model) -> Markup:
    batch = min(picked.latency, default=None)
    if batch is None:
        return Markup("")
    verdict = str(picked.latency[batch].get("verdict", ""))
    ratio = float(picked.latency[batch].get("speedup_vs_first", 0) or verdict.partition("x")[0] or 0)
    if verdict == BUSY:
        return Markup(", with no verdict on its speed, as the machine was busy")
    if "faster" in verdict:
        return Markup(", and answers {} <em>{} faster</em>").format(_one(batch), times(ratio))
    if "slower" in verdict:
        return Markup(", but answers {} <em class=bad>{} as fast</em>").format(_one(batch), f"{ratio:.2f}×")
    return Markup(", with no measurable difference in speed on {}").format(_one(batch))


def _one(batch: int) -> str:
    return "one row" if batch == 1 else rows_text(batch)


def _in_size(model: Model) -> str:
    return f", in {megabytes(model.size)}" if model.size else f", with {count(model.parameters)} parameters"


def _worth(report: Report, models: Sequence[Model], picked: Model) -> tuple[Model | None, Interval | None]:
    metric, control = Metric.of(report), control_of(picked, models)
    if control is None:
        return None, None
    worth = difference(picked.units, control.units, relative=metric.lower_is_better)
    if worth is None and not metric.lower_is_better:
        value = picked.score - control.score
        worth = Interval(value, value, value)
    return control, worth


def _kept_figure(metric: Metric, reference: Model, picked: Model) -> dict[str, Any]:
    relative = f"{metric.text(picked.score)} against {metric.text(reference.score)}"
    change = picked.change or Interval(0.0, 0.0, 0.0)
    if metric.lower_is_better or reference.score <= 0:
        name = f"change of {metric.title}"
        return _figure(name, f"{signed(change.value)} {metric.unit}", relative, _ends(change), None)
    kept = [1 + value / reference.score for value in (change.value, change.low, change.high)]
    sure = f"{100 * kept[1]:.1f} – {100 * kept[2]:.1f} %: 95 %, paired rows" if change.half else "no interval"
    return _figure(f"{metric.title} kept", f"{100 * kept[0]:.1f} %", relative, sure, *kept[: 3 if change.half else 1])


def _latency_figure(reference: Model, picked: Model, batch: int, device: str) -> dict[str, Any]:
    median, lower, upper = picked.quartiles(batch)
    base = reference.quartiles(batch)[0]
    ratio = speed(picked, reference, batch)
    verdict = speed_text(picked, reference, batch)
    relative = f"{verdict}: {milliseconds(base)}" if "no" in verdict else f"{verdict} than {milliseconds(base)}"
    if "slower" in verdict:
        relative = f"{ratio.value:.2f}× as fast as {milliseconds(base)}"
    sure = f"{times(ratio.low)} – {times(ratio.high)} by the quartiles"
    shares = (median / base, lower / base, upper / base)
    return _figure(f"{_one(batch)}, on this {device}", milliseconds(median), relative, sure, *shares)


def _ends(found: Interval) -> str:
    return f"{signed(found.low)} to {signed(found.high)}: 95 %, paired rows" if found.half else "no interval"


def _figure(
    name: str,
    value: str,
    relative: str,
    sure: str,
    share: float | None,
    low: float | None = None,
    high: float | None = None,
) -> dict[str, Any]:
    """A figure, with a bar of its share of the reference if it has one."""
    top = max(1.05, 1.05 * (high or share or 1))

    def at(part: float) -> float:
        return round(_BAR * min(1.0, max(0.0, part / top)), 1)

    number, _, unit = value.rpartition(" ")
    bar = None
    if share is not None:
        ends = (None, None) if low is None or high is None else (at(low), at(high))
        bar = {"at": at(share), "low": ends[0], "high": ends[1], "reference": at(1.0)}
    return {"name": name, "value": number, "unit": unit, "relative": relative, "sure": sure, "bar": bar}
