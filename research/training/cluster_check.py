"""`launch.py --check-cluster`: all that a launch of this experiment needs of the hosts, checked and shown, without training."""

import time

from research.cluster import host_tables
from research.cluster.rendezvous import Rendezvous
from research.cluster.world import joined
from research.config.experiment_folder import load_variants
from research.reliability.heartbeat import Progress
from research.reliability.parents import Parents
from research.reliability.watchdog import watchdog
from research.tracking.console import Console, show_tables
from research.tracking.format import plural
from research.training import preflight
from research.training.job import Job

MUST_BE_SHARED = ("track.runs",)
"""The settings of folders that all hosts must share. data.cache may be shared: a host that does not see it prepares its own."""


def check_cluster(job: Job, parents: Parents) -> None:
    """Compares the hosts, times an all-reduce along each axis, and shows both on rank 0. Collective.

    Every rank raises a SharedMistake if a launch would be refused, after rank 0 has shown what differs. Writes nothing but a file in
    each folder that is checked, and removes it. What makes no progress for watch.rendezvous_seconds once the ranks have met, such as an
    all-reduce over a link that is down, ends in exit code 124; so does a rank whose launcher is gone.
    """
    seconds = job.experiment.watch.rendezvous_seconds
    with watchdog(job.ranks, job.root, seconds, parents) as watch:
        _check(job, watch.progress)


def _check(job: Job, progress: Progress) -> None:
    ranks, experiment, began = job.ranks, job.experiment, time.monotonic()
    console, layout = Console(quiet=ranks.rank > 0), experiment.parallel
    seconds = experiment.watch.rendezvous_seconds
    with progress.work("meeting the other ranks"):
        rendezvous = Rendezvous.open(ranks, seconds, console.warn) if ranks.world > 1 else Rendezvous.alone(ranks)
    with progress.work("comparing the hosts"), rendezvous.sharing_errors():  # whose waits have limits of their own
        rendezvous.arrive()
        load_variants(job.folder, experiment)
        claims = preflight.claims(job, rendezvous.host)
        folders = {name: job.root / path for name, path in (("track.runs", experiment.track.runs), ("data.cache", experiment.data.cache))}
        report = host_tables.compare(rendezvous, claims, folders)
        fault = show_report(report, console) if report else None
        rendezvous.refuse("the comparison", fault, lambda values: values[0])
    progress.advance("connecting to the other ranks")
    with joined(ranks, layout.pipe, layout.tensor, layout.sequence, experiment.precision, job.verbose, rendezvous) as grid:
        progress.advance("timing all-reduces")
        links = host_tables.time_links(grid)
    if report:
        if links:
            show_tables([host_tables.links_table(links)])
        hosts = plural(len({each.host for each in report.hosts}), "host")
        agree = " agree" if ranks.world > 1 else ""
        console.header([("", f"{hosts} with {plural(ranks.world, 'rank')}{agree} · checked in {time.monotonic() - began:.1f} s")])


def show_report(report: host_tables.Report, console: Console) -> str | None:
    """Shows what has been compared, and returns the sentence with which a launch would be refused; None if it would not be."""
    show_tables(host_tables.tables(report, MUST_BE_SHARED))
    for warning in host_tables.warnings(report):
        console.warn(warning)
    return host_tables.fault_of(report, MUST_BE_SHARED)
