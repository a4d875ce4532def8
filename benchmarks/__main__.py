"""Run the measurements: `python -m benchmarks` runs all, `python -m benchmarks NAME` runs one.

A benchmark is a module of this folder, named below, with a docstring and `run() -> str`, which
measures and returns Markdown; RESULTS.md has a section for each. A benchmark with options takes them as
an argument of `run`; if `is_partial(options)`, its section stays as it is.
"""

import importlib
import inspect
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import takewhile

from benchmarks.results import write_section

BENCHMARKS = (
    "step_time",
    "time_to_gap",
    "estimators",
    "gradient_bias",
    "engines",
    "sweep",
    "import_time",
    "coverage",
    "particle_coverage",
    "vowel_evidence",
    "verdicts",
    "known_answers",
    "oracles",
    "default_rates",
    "distributions",
    "tabular_fits",
    "cartpole",
    "pendulum",
    "environment_steps",
    "bandits",
    "hypergrid",
    "hypergrid_peer",
    "deep_sea",
    "epistemic",
    "learning",
    "preference_scores",
    "preference_bandits",
    "direct_preferences",
    "active_preferences",
    "helpful_text",
    "language_checkpoints",
    "language_exact",
    "language_speed",
    "quantile_rewards",
    "smc_cost",
    "infilling",
    "compilation",
    "accelerator",
    "robustness_fuzz",
    "robustness",
)
OPTIONS = {"compilation": ("--against", "fbe1f64")}
"""Default options of benchmarks when all run."""


def main(arguments: list[str]) -> int:
    """Run the named benchmarks; several run in a separate process each."""
    named = list(takewhile(lambda word: not word.startswith("-"), arguments))
    options = arguments[len(named) :]
    unknown = [name for name in named if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark is called {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    names = named or list(BENCHMARKS)
    if len(names) == 1:
        return measure(names[0], options)
    if options:
        print(f"{options[0]}: options belong to one benchmark; name it alone", file=sys.stderr)
        return 2
    own = {name: [sys.executable, "-m", "benchmarks", name, *OPTIONS.get(name, ())] for name in names}
    return max(subprocess.run(own[name], check=False).returncode for name in names)  # noqa: S603


def measure(name: str, options: Sequence[str]) -> int:
    """Run one benchmark, show its results, and write its section."""
    start = time.perf_counter()
    module = importlib.import_module(f"benchmarks.{name}")
    takes_options = bool(inspect.signature(module.run).parameters)
    if options and not takes_options:
        print(f"{name} has no options", file=sys.stderr)
        return 2
    text = module.run(options) if takes_options else module.run()
    title = (module.__doc__ or name).partition("\n")[0].rstrip(".")
    if not (takes_options and module.is_partial(options)):
        write_section(name, title, text, BENCHMARKS)
    print(f"{name}: {title}\n\n{text}\n\n{time.perf_counter() - start:.0f} s\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
