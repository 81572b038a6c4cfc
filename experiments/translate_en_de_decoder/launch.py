"""Start this experiment: `deepspeed --num_gpus 2 launch.py`, or torchrun, srun, python; `--help` says the rest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

if __name__ == "__main__":
    try:
        from research.launch import run
    except ModuleNotFoundError as error:
        if error.name == "research":
            problem = f"{Path(__file__).parent} does not lie in Tessera's folder experiments → move it there"
        else:
            problem = f"this Python has no package {error.name} → source .venv/bin/activate, or pip install -r requirements.txt"
        sys.stderr.write(f"error  {problem}\n")
        sys.exit(2)

    run(__file__)
