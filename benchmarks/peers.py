"""Other libraries, each in its own environment, so that their dependencies never meet ours."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("BAYESRL_PEERS", Path(__file__).parent / ".peers"))
"""Folder of the environments; `BAYESRL_PEERS` may name another."""

SB3 = ("sb3", ("stable-baselines3==2.9.2", "torch==2.13.0", "gymnasium>=1.1,<2"))
TRL = (
    "lm",
    ("torch==2.13.0", "transformers==5.24.0", "trl==1.16.0", "datasets==5.2.0", "accelerate==1.15.0"),
)
GYMNAX = ("gymnax", ("gymnax==1.0.1", "six"))
TORCHGFN = ("torchgfn", ("torch==2.13.0", "torchgfn==2.4.1"))
WITH_TORCH = ("lm", "torchgfn")


def python_of(peer: tuple[str, tuple[str, ...]]) -> Path:
    """Return the interpreter of a peer's environment; make the environment if it is missing."""
    name, packages = peer
    python = FOLDER / name / "bin" / "python"
    if not python.exists():
        print(f"making an environment for {name}: {', '.join(packages)}", file=sys.stderr, flush=True)
        # Torch for Python 3.12 would bring gigabytes of CUDA; for 3.11 there is a wheel for the CPU.
        base = (shutil.which("python3.11") if name in WITH_TORCH else None) or sys.executable
        subprocess.run([base, "-m", "venv", str(FOLDER / name)], check=True)  # noqa: S603
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)  # noqa: S603
    return python


def run_peer(
    peer: tuple[str, tuple[str, ...]], script: str, *arguments: str, variables: Mapping[str, str] | None = None
) -> Any:
    """Run a script of this folder in a peer's environment; its last line is its answer, as JSON."""
    path = Path(__file__).parent / script
    command = [str(python_of(peer)), str(path), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **(variables or {})})  # noqa: S603
    return json.loads(done.stdout.strip().splitlines()[-1])
