"""Run the measurements: `python -m benchmarks` all of them, `python -m benchmarks NAME` one.

A benchmark is a module of this folder, named below, with a docstring and `run() -> str`, which
measures and gives Markdown; RESULTS.md keeps one section of each.
"""

import importlib
import subprocess
import sys
import time

from benchmarks.results import write_section

BENCHMARKS = (
    "step_time",
    "time_to_gap",
    "estimators",
    "sweep",
    "import_time",
    "coverage",
    "verdicts",
    "known_answers",
    "tabular_fits",
    "cartpole",
    "pendulum",
    "environment_steps",
    "bandits",
    "deep_sea",
    "epistemic",
    "learning",
    "language_checkpoints",
    "language_exact",
    "language_speed",
    "accelerator",
)


def main(arguments: list[str]) -> int:
    """Run what is named, each in a process of its own where there are several."""
    unknown = [name for name in arguments if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark is called {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    names = arguments or list(BENCHMARKS)
    if len(names) == 1:
        measure(names[0])
        return 0
    codes = [subprocess.run([sys.executable, "-m", "benchmarks", name], check=False).returncode for name in names]  # noqa: S603
    return max(codes)


def measure(name: str) -> None:
    """Run one benchmark, show what it found, and write its section."""
    start = time.perf_counter()
    module = importlib.import_module(f"benchmarks.{name}")
    text = module.run()
    title = (module.__doc__ or name).partition("\n")[0].rstrip(".")
    write_section(name, title, text, BENCHMARKS)
    print(f"{name}: {title}\n\n{text}\n\n{time.perf_counter() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
