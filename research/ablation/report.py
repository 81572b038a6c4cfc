"""What `compare` says: verdicts in words, a table for the terminal, a report in Markdown, tables in CSV, and JSON data."""

import csv
import io
import math
import re
import statistics as descriptive
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from research.ablation.comparison import Comparison, Question, Variant
from research.ablation.sides import Side
from research.ablation.statistics import MOST_SEEDS, POWER, Verdict
from research.config.diff import Change, describe_changes
from research.tracking import format as fmt
from research.tracking.format import plural

CURVES, DIFFERENCES = "curves", "differences"
"""The pictures' names, which _light or _dark and the format's ending follow."""
MOST_TEXT_ERRORS = 1.96
"""Standard errors of the held-out text within which a difference is not told from its noise."""
CELL = 200
"""The most characters of a cell of a Markdown table: settings may be a stranger's."""
METHOD = """Runs are paired by seed: the same data order, and the same initial weights wherever shapes allow. A difference is variant −
baseline of one seed. The interval and p are Student's t of the mean difference over seeds; p is adjusted by Holm if there are several
variants, the intervals are not. A variant is better or worse if the adjusted p is at most 0.05: with no true difference that happens in
5 % of comparisons. The number of further seeds is what tells the effect in 80 % of repetitions, if the spread stays the same."""


def numbers(variant: Variant) -> tuple[str, str, str]:
    """(mean difference, low, high) with as many decimals as the spread over seeds bears."""
    effect = variant.effect
    spread = effect.deviation if effect.n > 1 and effect.deviation else abs(effect.mean) / 10
    digits = min(6, max(0, 1 - math.floor(math.log10(spread)))) if spread > 0 else 4
    return tuple(f"{value:+.{digits}f}" for value in (effect.mean, effect.low, effect.high))  # type: ignore[return-value]


def p_value(p: float) -> str:
    """0.012, 0.3, < 0.001."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def sentence(comparison: Comparison, variant: Variant) -> str:
    """The verdict in words, with its numbers, and how many more seeds would tell what these do not."""
    question, effect, baseline, side = comparison.question, variant.effect, comparison.baseline.label, variant.side.label
    mean, low, high = numbers(variant)
    difference = f"{mean} in {question.metric}"
    if effect.n < 2:
        why = "one pair of runs says nothing of the noise between seeds (train two more seeds of each)"
        return f"{side} is not distinguishable from {baseline}: {difference}, and {why}{_text_noise(variant)}"
    p = p_value(variant.adjusted_p)
    numbers_said = f"{difference}, 95 % interval {low} to {high}, p {p if p.startswith('<') else f'= {p}'}"
    numbers_said += f" by Holm over {len(comparison.variants)} variants" if len(comparison.variants) > 1 else ""
    numbers_said += f", {plural(effect.n, 'seed')}{_text_noise(variant)}"
    if variant.verdict is not Verdict.NOT_DISTINGUISHABLE:
        return f"{side} is {variant.verdict.value} than {baseline}: {numbers_said}"
    target = f"an effect of {variant.target:.2g}"
    if variant.more_seeds:
        target = f"about {plural(variant.more_seeds, 'more seed')} would tell {target}"
    elif variant.more_seeds == 0:
        target = f"these seeds would have told {target} in {100 * POWER:.0f} % of cases"
    else:
        target = f"no number of seeds up to {MOST_SEEDS:,} would tell {target}"
    return f"{side} is not distinguishable from {baseline} at this budget ({target}): {numbers_said}"


def _text_noise(variant: Variant) -> str:
    """What the noise of the held-out text adds, if it is known."""
    if variant.text_stderr is None:
        return ""
    inside = abs(variant.effect.mean) <= MOST_TEXT_ERRORS * variant.text_stderr
    told = "within" if inside else "more than"
    return f"; the difference is {told} the noise of the held-out text (standard error {variant.text_stderr:.2g} over its windows)"


def heading(comparison: Comparison) -> str:
    """'val/bits_per_byte, lower is better, final value at 553 k tokens'."""
    question = comparison.question
    better = "higher" if question.higher_is_better else "lower"
    return f"{question.metric}, {better} is better · {question.value} value at {place(comparison)}"


def place(comparison: Comparison) -> str:
    """Where the runs are compared: '553 k tokens', '270 steps', '2:57'."""
    question = comparison.question
    unit = "" if question.at == "seconds" else f" {question.at}"
    return f"{question.axis.tick(comparison.place)}{unit}"


def warnings(comparison: Comparison) -> list[str]:
    """Everything that makes the comparison mean less than it seems, each once."""
    found = list(comparison.warnings)
    if comparison.cut:
        cut = ", ".join(comparison.cut)
        found.append(f"{cut} goes on beyond {place(comparison)}, where the shortest run ends: its learning rate had not fallen yet")
    return list(dict.fromkeys([*found, *(warning for variant in comparison.variants for warning in variant.warnings)]))


def table(comparison: Comparison) -> Table:
    """One row for each side; 80 columns hold it, with names of 17."""
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for column in ("", "n", "final", "best", "difference", "95 % interval", "p"):
        shown.add_column(column, justify="right" if column else "left", overflow="fold", no_wrap=bool(column))
    for row in _rows(comparison):
        shown.add_row(*row)
    return shown


def _rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for side in comparison.sides:
        final, best = (comparison.numbers(side, value) for value in ("final", "best"))
        spread = f" ± {descriptive.stdev(final):.2g}" if len(final) > 1 else ""
        row = [side.label, f"{len(final)}", f"{_number(descriptive.fmean(final))}{spread}", _number(descriptive.fmean(best))]
        variant = next((variant for variant in comparison.variants if variant.side is side), None)
        if variant:
            mean, low, high = numbers(variant)
            interval = [f"{low} to {high}".replace("+", ""), p_value(variant.adjusted_p)] if variant.effect.n > 1 else ["–", "–"]
            row += [mean, *interval]
        rows.append([*row, *[""] * (7 - len(row))])
    return rows


def _number(value: float) -> str:
    """Four figures."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


# Markdown


def markdown(comparison: Comparison) -> str:
    """The report: what differs, the verdicts, the numbers, pictures for either theme, the method, the runs."""
    question, baseline = comparison.question, comparison.baseline
    names = ", ".join(_plain(variant.side.label) for variant in comparison.variants)
    parts = [f"# {names} beside {_plain(baseline.label)}", f"{_plain(heading(comparison))}.", "## What differs"]
    for variant in comparison.variants:
        parts += _what_differs(baseline, variant)
    parts += [f"> **Warning:** {_plain(warning)}." for warning in warnings(comparison)]
    parts += ["## Verdict", "\n".join(f"- {_plain(sentence(comparison, variant))}." for variant in comparison.variants)]
    head = ["", "seeds", "final", "best", "difference", "95 % interval", "p"]
    parts.append(_markdown_table(head, _rows(comparison)))
    parts += [_picture(DIFFERENCES, "the differences with their intervals"), _picture(CURVES, f"{question.metric} of all runs")]
    parts += ["## Method", METHOD.replace("\n", " "), "## Runs"]
    head = ["side", "seed", "run", "final", "best", "commit"]
    parts.append(_markdown_table(head, [[*row[:3], _number(row[3]), _number(row[4]), row[5]] for row in _runs(comparison)]))
    return "\n\n".join(parts) + "\n"


def _what_differs(baseline: Side, variant: Variant) -> list[str]:
    name, parent = _plain(variant.side.label), _plain(baseline.label)
    parts = [f"**{name}**: {_plain(variant.side.first.experiment.question)}"]
    if variant.changes:
        parts.append(_markdown_table(["setting", parent, name], [_cells(change) for change in variant.changes]))
    elif not variant.code:
        parts.append("No setting that affects results differs.")
    if variant.code:
        fence = "`" * (1 + max(map(len, re.findall("`+", variant.code)), default=2))
        parts.append(f"{fence}diff\n{variant.code.rstrip()}\n{fence}")
    if variant.plumbing:
        parts.append(f"Differs without an effect on results: {_plain(describe_changes(list(variant.plumbing)))}.")
    return parts


def _cells(change: Change) -> list[str]:
    name, *values = change
    return [name, *(describe_changes([(name, "", value)]).partition(" → ")[2] for value in values)]


def _plain(text: str) -> str:
    """The text on one line, without what Markdown or HTML would act on."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", fmt.one_line(text, None))


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *([_plain(fmt.one_line(str(cell), CELL)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _picture(name: str, says: str) -> str:
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{name}_dark.svg">'
    return f'<picture>{dark}<img alt="{says}" src="{name}_light.svg"></picture>'


# CSV and JSON


def _runs(comparison: Comparison) -> list[tuple[str, int, str, float, float, str]]:
    """(side, seed, run, final, best, commit) of every run."""
    return [
        (side.label, seed, run.folder.title, values.final, values.best, str(run.record.get("commit") or "–"))
        for side in comparison.sides
        for seed, run in side.runs.items()
        for values in [comparison.values[side.label][seed]]
    ]


def runs_csv(comparison: Comparison) -> str:
    """A row for each run, with all digits."""
    return _csv(["side", "seed", "run", "final", "best", "commit"], _runs(comparison))


def differences_csv(comparison: Comparison) -> str:
    """A row for each variant, with all digits."""
    rows = [variant_as_json(comparison, variant) for variant in comparison.variants]
    columns = [name for name, value in rows[0].items() if not isinstance(value, (list, dict))]
    return _csv(columns, [[row[column] for column in columns] for row in rows])


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All of it as JSON data."""
    question: Question = comparison.question
    asked = {"metric": question.metric, "at": question.at, "value": question.value, "higher_is_better": question.higher_is_better}
    runs = [dict(zip(("side", "seed", "run", "final", "best", "commit"), row, strict=True)) for row in _runs(comparison)]
    variants = [variant_as_json(comparison, variant) for variant in comparison.variants]
    return {**asked, "place": comparison.place, "warnings": warnings(comparison), "variants": variants, "runs": runs}


def variant_as_json(comparison: Comparison, variant: Variant) -> dict[str, Any]:
    """One variant beside the baseline."""
    effect = variant.effect
    changes = [{"setting": name, "baseline": then, "variant": now} for name, then, now in variant.changes]
    return {
        **{"variant": variant.side.label, "baseline": comparison.baseline.label, "metric": comparison.question.metric},
        **{"pairs": effect.n, "difference": effect.mean, "low": effect.low, "high": effect.high, "deviation": effect.deviation},
        **{"p": effect.p, "adjusted_p": variant.adjusted_p, "verdict": variant.verdict.value, "text_stderr": variant.text_stderr},
        **{"effect_to_tell": variant.target, "more_seeds": variant.more_seeds, "sentence": sentence(comparison, variant)},
        **{"changes": changes, "differences": dict(zip(map(str, variant.seeds), variant.differences, strict=True))},
    }
