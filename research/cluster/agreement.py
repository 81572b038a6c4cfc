"""What must be equal on all ranks before a model is built: settings, code, versions, variables; and the folders that all hosts must share.

A rank's `Claims` are plain JSON. `differences` compares them by name, so that an error names the setting or the file, not two hashes.
"""

import json
import os
import platform
import re
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from research.cluster.environment import Ranks, numeric_variables, threads_per_rank
from research.cluster.network import gloo_address, interface_to_others, is_loopback, machine, unreachable_sentence
from research.cluster.rendezvous import Rendezvous
from research.cluster.software import digest_of, library_versions

NONCE_SECONDS = 5.0
"""How long a file that another host has written may take to be seen: network file systems keep what they know of a folder for seconds."""
WAYS_OUT = {
    "launch": "start the same launch command on every host, with ranks of one launch only",
    "settings": "give every host the same config.py and the same command line",
    "versions": "install the same requirements.txt on every host",
    "variables": "set it alike in the environment of every rank (deepspeed passes on what stands in ~/.deepspeed_env)",
    "weights": "give every host the same file, best on a disk that they share",
    "library": "copy the tree to every host, or put it on a disk that they share",
    "experiment": "copy the experiment's folder to every host, or put it on a disk that they share",
    "checkpoint": "put the run that is to be resumed on a disk that all hosts share",
    "data": "give all hosts the same files, best on a disk that they share",
}
"""Kind of claim, in the order in which differences are reported -> what to do about a difference."""
FILES = ("library", "experiment", "checkpoint")
"""Kinds of claims that are files, by path."""
OF_A_LAUNCH_ONLY = ("checkpoint", "data")
"""Kinds of claims that --check-cluster does not compare: it resumes nothing and prepares no text."""
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Claims:
    """What one rank is about to do, and where. `named` must be equal on all ranks; `rounding` should, or numbers differ in rounding."""

    rank: int
    host: str
    machine: str = ""
    address: str = ""
    """The address that gloo gives to the other ranks."""
    interface: str = ""
    """The name of the interface that leads to the other hosts."""
    named: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind -> name -> value; the kinds are of WAYS_OUT, the same ones on all ranks."""
    rounding: dict[str, str] = field(default_factory=dict)
    """Name -> value of what may differ, at the price of another rounding."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Difference:
    """A name that one rank values differently than rank 0."""

    kind: str
    name: str
    claimed: Any
    expected: Any
    claims: Claims
    first: Claims

    def __str__(self) -> str:
        if self.kind in FILES:
            missing = f"{self.claims} has no {self.name}" if self.claimed is None else f"{self.claims} has another {self.name}"
            extra = f"{self.claims} has {self.name}, which {self.first} has not"
            return extra if self.expected is None else f"{missing} than {self.first}" if self.claimed is not None else missing
        return f"{self.claims} has {self.name} = {shown(self.claimed)}, {self.first} has {shown(self.expected)}"


def claims_of(
    ranks: Ranks,
    host: str,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    weights: Mapping[str, str],
    library: Mapping[str, str],
    experiment: Mapping[str, str],
) -> Claims:
    """This rank's claims. `settings` by dotted name; `library` and `experiment`: SHA-256 by path. Imports torch.

    `options`: what of the command line is no setting, but decides what the ranks do; `weights`: digests of what training starts from.
    """
    import torch

    from parallel.distributed import gpu_index

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator.type if accelerator else "cpu"
    name = torch.cuda.get_device_name(gpu_index(ranks.local_rank, torch.cuda.device_count())) if device == "cuda" else ""
    capability = torch.backends.cpu.get_cpu_capability()
    named: dict[str, dict[str, Any]] = {
        "launch": {"the number of ranks": ranks.world, "the device": device, **options},
        "settings": dict(settings),
        "versions": {**library_versions(), "CUDA": torch.version.cuda, "byte order": sys.byteorder},
        "variables": dict(numeric_variables()),
        "weights": dict(weights),
        "library": dict(library),
        "experiment": dict(experiment),
    }
    rounding = {
        "threads": str(threads_per_rank(ranks)),
        "processor": f"{platform.machine()} {capability}",
        **({"GPU": name} if name else {}),
    }
    return Claims(ranks.rank, host, machine(), gloo_address(), interface_to_others(ranks.master_addr), named, rounding)


def agree(rendezvous: Rendezvous, claims: Claims) -> list[str]:
    """Every rank raises a SharedMistake if a rank's claims differ from rank 0's. Returns warnings about rounding. Collective.

    First only digests travel. Only if two differ does every rank send all its claims, so that the sentence can name what differs.
    """

    def compare_claims(values: list[dict[str, Any]]) -> dict[str, Any]:
        found = [Claims(**value) for value in values]
        if any(other.named != found[0].named for other in found):
            return {"whole": True, "warnings": []}
        if sentence := unreachable(found):
            rendezvous.fail(sentence)
        return {"whole": False, "warnings": rounding_warnings(found)}

    short = {**asdict(claims), "named": {kind: {"": _digest(values)} for kind, values in claims.named.items()}}
    decision = rendezvous.decide("claims in short", short, compare_claims)
    if decision["whole"]:
        refuse_disagreement(rendezvous, "claims", claims)
    return decision["warnings"]


def refuse_disagreement(rendezvous: Rendezvous, name: str, claims: Claims) -> None:
    """Every rank raises a SharedMistake if a rank's claims differ from rank 0's. `name` is used once. Collective."""
    rendezvous.refuse(name, asdict(claims), lambda values: disagreement([Claims(**value) for value in values]))


def differences(claims: Sequence[Claims]) -> list[Difference]:
    """What differs from rank 0's claims: every name once, with the first rank that differs; in the order of WAYS_OUT."""
    first, *others = claims
    found: dict[tuple[str, str], Difference] = {}
    for kind in WAYS_OUT:
        expected = first.named.get(kind, {})
        for other in others:
            own = other.named.get(kind, {})
            for name in dict.fromkeys([*expected, *own]):
                if own.get(name) != expected.get(name) and (kind, name) not in found:
                    found[kind, name] = Difference(kind, name, own.get(name), expected.get(name), other, first)
    return list(found.values())


def disagreement(claims: Sequence[Claims]) -> str | None:
    """One sentence about what differs; None if nothing does."""
    found = differences(claims)
    if not found:
        return None
    same_kind = [difference for difference in found if difference.kind == found[0].kind]
    text = str(found[0])
    if found[0].kind in FILES and len(same_kind) > 1:
        others = [difference.name for difference in same_kind[1:]]
        text += f", and so {', '.join(others[:2])}" + (f" and {len(others) - 2} more files" if len(others) > 2 else "")
    elif len(same_kind) > 1:
        text += "; " + "; ".join(f"{each.name} = {shown(each.claimed)}, not {shown(each.expected)}" for each in same_kind[1:3])
        text += f" and {len(same_kind) - 3} more" if len(same_kind) > 3 else ""
    kinds = dict.fromkeys(each.kind for each in found if each.kind != found[0].kind)
    if kinds:
        text += f" (the {', '.join(kinds)} differ too)"
    more = "" if found[0].kind in OF_A_LAUNCH_ONLY else "; --check-cluster shows all differences"
    return f"{text} → {WAYS_OUT[found[0].kind]}{more}"


def unreachable(claims: Sequence[Claims]) -> str | None:
    """What is wrong if there are several machines and one of them gives the others an address of its own loopback; None if nothing is."""
    if len({each.machine for each in claims}) > 1:
        for each in claims:
            if is_loopback(each.address):
                return unreachable_sentence(each.host, each.address, each.interface)
    return None


def rounding_warnings(claims: Sequence[Claims]) -> list[str]:
    """A sentence for each thing that differs and changes how numbers are rounded."""
    first, *others = claims
    warnings = []
    for name, expected in first.rounding.items():
        if other := next((each for each in others if each.rounding.get(name) != expected), None):
            warnings.append(
                f"{other} has {name} = {other.rounding.get(name)}, {first} has {expected}: results are equal within rounding only"
                + (" → set OMP_NUM_THREADS alike on all hosts" if name == "threads" else "")
            )
    return warnings


def check_shared_folder(rendezvous: Rendezvous, folder: Path, setting: str) -> None:
    """Every rank raises a SharedMistake unless all of them can read and write `folder`, as one and the same. Collective."""
    if text := not_shared(str(folder), setting, folder_seen(rendezvous, folder, setting)):
        rendezvous.refuse(f"not shared: {setting}", None, lambda values: text)


def not_shared(folder: str, setting: str, seen: Sequence[Sequence[str]]) -> str | None:
    """One sentence about the ranks that cannot use the folder, of which `folder_seen` has returned `seen`; None if all can."""
    troubled = [each for each in seen if each[1]]
    if not troubled:
        return None
    who, trouble = troubled[0]
    more = f" (and {len(troubled) - 1} more ranks)" if len(troubled) > 1 else ""
    return (
        f"the hosts do not share {folder}: {seen[0][0]} has written to it, {who}{more} {trouble} → "
        f"put the tree on a disk that all hosts share, at one path, or set {setting} to a folder on one"
    )


def folder_seen(rendezvous: Rendezvous, folder: Path, setting: str) -> list[list[str]]:
    """(rank and host, why it cannot read and write what rank 0 has written to `folder`, or '') of each rank, on every rank. Collective.

    Rank 0 writes a file with a random content, every other rank must read it and write one beside it. All of them are removed, and so
    is the folder where it was not there before.
    """
    nonce, created = uuid.uuid4().hex, None
    if rendezvous.ranks.rank == 0:
        created = next((parent for parent in reversed([folder, *folder.parents]) if not parent.exists()), None)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            nonce_path(folder, nonce).write_text(nonce)
        except OSError as error:
            raise Mistake(f"{folder} cannot be written ({error.strerror}) → set {setting} to a folder you may write") from error
    path, nonce = rendezvous.decide(f"nonce in {setting}", [str(folder), nonce], lambda values: values[0])
    try:
        trouble = _read_and_write(Path(path), nonce, rendezvous.ranks.rank)
        own = [f"rank {rendezvous.ranks.rank} on {rendezvous.host}", trouble]
        return rendezvous.decide(f"seen in {setting}", own, lambda values: values)
    finally:
        if rendezvous.ranks.rank == 0:
            for left in [nonce_path(folder, nonce), *folder.glob(f"{nonce_path(folder, nonce).name}.*")]:
                left.unlink(missing_ok=True)
            while created and folder.is_relative_to(created) and not any(folder.iterdir()):
                folder.rmdir()
                folder = folder.parent


def nonce_path(folder: Path, nonce: str) -> Path:
    """The file in which the ranks look for `nonce`."""
    return folder / f".shared-{nonce}"


def _read_and_write(folder: Path, nonce: str, rank: int) -> str:
    """Why this rank cannot use the folder that rank 0 has written to; '' if it can."""
    path, deadline = nonce_path(folder, nonce), time.monotonic() + NONCE_SECONDS
    while True:
        try:
            if path.read_text() == nonce:
                break
            trouble = "another content"
        except OSError as error:
            trouble = error.strerror or str(error)
        if time.monotonic() > deadline:
            return f"does not see {path.name} there ({trouble})"
        time.sleep(0.1)
        try:  # a look at the folder makes a network file system ask again
            os.listdir(folder)
        except OSError:
            continue
    try:
        (own := path.with_name(f"{path.name}.{rank}")).write_text(nonce)
        own.unlink()
    except OSError as error:
        return f"may read it but not write to it ({error.strerror})"
    return ""


def _digest(values: Mapping[str, Any]) -> str:
    return digest_of({name: json.dumps(value, sort_keys=True) for name, value in values.items()})


def shown(value: Any) -> str:
    """A value as one would write it: 'none' for one that is not set, 'SHA-256' and the beginning of a digest, 40 letters of a long text."""
    if value is None:
        return "none"
    if isinstance(value, str) and DIGEST.fullmatch(value):
        return f"SHA-256 {value[:16]}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"
