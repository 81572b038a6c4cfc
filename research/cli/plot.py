"""`python -m research plot RUN …`: draws the metrics of one run, or of several over each other. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from parallel.errors import Mistake, listed, nearest
from research.cli.run_differences import labels, settings_of
from research.cli.verbs import Parser
from research.tracking import metrics, plot, run_folder
from research.tracking.console import Console
from research.tracking.format import plural, short_path
from research.tracking.plot import DARK, LIGHT, NAMED, TASKS, X_AXES, Curves, Panel
from research.tracking.run_folder import RunFolder

WHAT = f"""Draws metrics.jsonl: the training loss as a line with the validations as dots, the learning rate, the gradient norm, and the
tasks that were evaluated in training, with their standard errors. Several runs are drawn over each other, one colour per run; the legend
names the settings in which they differ. A curve of {plot.SMOOTHED_FROM} rows or more is smoothed: its line is the mean of a tenth of its
rows around each point, and every row is drawn faintly behind it. Fewer rows are drawn as they are."""
TASKS_METRIC = "tasks"
DEFAULT = ("loss", "lr", "grad_norm", TASKS_METRIC)
FORMATS = (".png", ".svg")


def main(argv: list[str]) -> None:
    """Draws the picture and says where it is."""
    parser = Parser("plot", WHAT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder (runs/gpt_sotu/latest), its name or its title")
    parser.add_argument("--x", choices=tuple(X_AXES), default="tokens", help="what the metrics are drawn over (default: tokens)")
    parser.add_argument(
        "--metric",
        nargs="+",
        metavar="METRIC",
        help=f"{', '.join([*NAMED, TASKS_METRIC])}, or any key of metrics.jsonl, such as eval/agreement/accuracy; one panel for each "
        f"(default: {' '.join(DEFAULT)}, as far as there are any)",
    )
    parser.add_argument("--out", type=Path, default=Path("plot.png"), help="the picture, .png or .svg (default: plot.png)")
    parser.add_argument("--dark", action="store_true", help="light lines on a dark background")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix.lower() not in FORMATS:
        raise Mistake(f"--out {arguments.out} is neither PNG nor SVG → use {arguments.out.stem or 'plot'}.png or .svg")

    folders = list({folder.path: folder for folder in map(run_folder.find, arguments.runs)}.values())
    runs = curves(folders)
    panels = panels_of(arguments.metric, runs)
    theme = DARK if arguments.dark else LIGHT
    figure = plot.draw(runs, panels, X_AXES[arguments.x], theme, title(folders, runs))
    try:
        plot.save(figure, arguments.out)
    except OSError as error:
        raise Mistake(f"--out {arguments.out} cannot be written ({error.strerror}) → name a file in a folder that exists") from None
    shown = ", ".join(panel.key for panel in panels)
    Console().header([("drawn", f"{short_path(arguments.out)} · {plural(len(runs), 'run')} · {shown} over {arguments.x}")])


def curves(folders: Sequence[RunFolder]) -> list[Curves]:
    """The rows of each run, with a name that tells it apart from the others."""
    found = [(folder, settings_of(folder)) for folder in folders]
    runs = [Curves(label, list(metrics.read(folder.metrics))) for label, folder in zip(labels(found), folders, strict=True)]
    for run, folder in zip(runs, folders, strict=True):
        if not run.rows:
            raise Mistake(f"{folder.title} has no rows in {folder.metrics.name} → plot a run that has logged a step")
    return runs


def panels_of(asked: Sequence[str] | None, runs: Sequence[Curves]) -> list[Panel]:
    """One panel for each metric; `tasks` is one for each metric of a task, without its parts (accuracy, not accuracy/subject_verb).

    Raises a Mistake for a metric that no run has logged.
    """
    there = plot.keys_of([row for run in runs for row in run.rows])
    panels: list[Panel] = []
    for name in DEFAULT if asked is None else asked:
        if name == TASKS_METRIC:
            tasks = [key for key in there if key.startswith(TASKS)]
            found = [plot.panel_of(key) for key in tasks if not any(key.startswith(f"{whole}/") for whole in tasks)]
        else:
            panel = NAMED.get(name) or plot.panel_of(name)
            found = [panel] if {panel.key, panel.dots} & {*there} else []
        if asked is not None and not found:
            names = [*(short for short, panel in NAMED.items() if panel.key in there), *there]
            near = nearest(name, names)
            raise Mistake(f"no row has the metric {name} → " + (f"did you mean {near}?" if near else f"use {listed(names)}"))
        panels += [panel for panel in found if panel not in panels]
    if not panels:
        raise Mistake(f"there is nothing to draw by default → name a metric: {listed(there) or 'the runs have logged none'}")
    return panels


def title(folders: Sequence[RunFolder], runs: Sequence[Curves]) -> str:
    """'gpt_sotu-7f3a2c', '3 runs of gpt_sotu', or '2 runs'."""
    names = sorted({folder.name for folder in folders})
    return runs[0].label if len(runs) == 1 else f"{len(runs)} runs" + (f" of {names[0]}" if len(names) == 1 else "")
