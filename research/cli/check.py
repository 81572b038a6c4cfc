"""`python -m research check [FOLDERS]`: does each experiment load, divide, and differ from its parent in what it declares? No torch."""

import sys

from research.ablation import lineage, results
from research.ablation.lineage import Family, Member
from research.cli.json_output import add_json_option, print_json
from research.cli.verbs import Parser
from research.config.diff import describe_changes
from research.tracking.console import Console
from research.tracking.format import plural, short_path

WHAT = """Loads experiments and compares each with its parent: the settings that affect results, and variant.py, must differ in exactly
what `changes` declares. Settings that affect no result, such as the layout or what is logged, may differ freely. An experiment must also
fit the smallest number of ranks of its own layout, and its results/ must be of the settings that it and its parent have. Prints a line for
each; the exit code is 1 if something is wrong."""
OK, WRONG = "ok", "wrong"


def main(argv: list[str]) -> None:
    """Prints a line for each folder, or several if several things are wrong."""
    parser = Parser("check", WHAT)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="experiments, by folder or name (default: all of experiments/)")
    add_json_option(parser, "the problems of each experiment")
    arguments = parser.parse_args(argv)
    everything = Family()
    asked = lineage.families_of(arguments.folders) if arguments.folders else [(everything, name) for name in everything.names]
    console = Console(sys.stderr) if arguments.json else Console()
    problems: dict[str, list[str]] = {}
    for family, name in asked:
        member = family.member(name)
        found = lineage.problems(member, family) or results.problems(member, family)
        problems[short_path(member.folder)] = found
        console.header([(WRONG, sentence) for sentence in found] or [(OK, line(member, family))])
    if arguments.json:
        print_json([{"experiment": experiment, "problems": found} for experiment, found in problems.items()])
    wrong = sum(map(bool, problems.values()))
    if wrong:
        console.header([("", f"{wrong} of {plural(len(asked), 'experiment')} {'is' if wrong == 1 else 'are'} not what config.py declares")])
        raise SystemExit(1)


def line(member: Member, family: Family) -> str:
    """'gpt_sotu_dyt · gpt_sotu with model.norm layernorm → variant:DynamicTanh', of an experiment with which all is well."""
    experiment = member.experiment
    if experiment is None or experiment.parent is None:
        return f"{member.name} · has no parent"
    changes = lineage.differences_from(family.member(experiment.parent), member)
    return f"{member.name} · {experiment.parent} with " + (describe_changes(changes) or "nothing that affects results changed")
