"""Start this experiment: `deepspeed --num_gpus 2 launch.py`, or torchrun, srun, python; `--help` says the rest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from research.launch import run

    run(__file__)
