"""What a run must remember beside its engine: into a checkpoint's facts, and out of them. Numbers and names only, as JSON has them."""

import math
from typing import TYPE_CHECKING, Any

from parallel.errors import Mistake
from research.between import DO, VALIDATION
from research.machine import git_state
from research.metrics import finite
from research.preflight import config_hash
from research.spikes import Spikes

if TYPE_CHECKING:
    from research.train import Run


def facts(run: "Run") -> dict[str, Any]:
    """Equal on every rank, but for the clock; rank 0's are kept."""
    schedule = run.job.experiment.schedule
    return {
        "step": run.step,
        "samples": run.step * schedule.batch_size,
        "tokens": run.step * run.job.layout.tokens_per_step,
        "applied_steps": run.step - run.engine.skipped_steps,
        "config": config_hash(run.job.experiment),
        "commit": git_state(run.job.root)[0],
        "data": run.corpus.fingerprint,
        "run": {
            "seconds": run.meter.seconds(),
            "best": run.best,
            "interval_losses": finite(run.meter.losses),
            "recent_losses": list(run.spikes.recent),
            "skips_in_a_row": run.skips_in_a_row,
            "due": list(run.due),
        },
    }


def refuse_other_data(told: dict[str, Any], fingerprint: Any, checkpoint: str) -> None:
    """A Mistake where the text or the tokenizer is not what the checkpoint's run was trained on, whatever its name."""
    if told.get("data") != fingerprint:
        raise Mistake(
            f"the data is not what {checkpoint} was trained on (fingerprint {_short(told.get('data'))} → {_short(fingerprint)}) → "
            "put the old files back, or begin a run of its own (without --resume)"
        )


def restore(run: "Run", told: dict[str, Any]) -> None:
    """Sets what `facts` told. A Mistake for what is no such thing: it is read from a file."""
    mine = told.get("run")
    try:
        run.step = told["step"]
        run.meter.resume(float(mine["seconds"]), [float(loss) for loss in mine["interval_losses"]])  # type: ignore[index]
        run.best = _best(mine["best"])  # type: ignore[index]
        run.spikes = Spikes(run.spikes.threshold, [float(loss) for loss in mine["recent_losses"]])  # type: ignore[index]
        run.skips_in_a_row = int(mine["skips_in_a_row"])  # type: ignore[index]
        run.due = _due(mine)
    except (KeyError, TypeError, ValueError) as error:
        raise Mistake(f"the checkpoint does not say how its run stood ({error!r:.100}) → use another checkpoint of the run") from None


def _due(mine: Any) -> list[str]:
    """What a signal had cut short. Older checkpoints knew of nothing but validations."""
    if "due" not in mine:
        return [VALIDATION] if mine["validation_due"] else []
    return [what for what in DO if what in mine["due"]]


def _best(told: Any) -> tuple[float, int] | None:
    if told is None:
        return None
    bits, step = told
    return (float(bits), int(step)) if math.isfinite(bits) else None


def _short(fingerprint: Any) -> str:
    return str(fingerprint)[:60]
