"""Thousands of fits of random programs: each shape is set up and compiled once."""

import os

# Many small programs run briefly, and only their results count, not their speed: XLA may optimise less.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import bayesrl
from bayesrl.svi.fitting import posterior_of
from bayesrl.svi.optimizers import default_optimizer
from bayesrl.svi.problem_setup import Setup, set_up
from bayesrl.svi.step import FitState, run_chunk
from bayesrl.svi.training_loop import TrainingLoop
from benchmarks.random_programs import Shape, Truth, all_assignments, log_q_of, truth

STEPS = 400


class Fitted(NamedTuple):
    """A fit of one random program, and the truth about it."""

    posterior: bayesrl.Posterior
    truth: Truth
    beta: float
    missed: float


class Fitter:
    """Fits programs of one shape.

    Args:
        key: random key; do not use it again.
        shape: shape of the programs.
        guide: guide of the fits; by default, the automatic one.
    """

    def __init__(self, key: Array, shape: Shape, rng: np.random.Generator, guide: Any = None) -> None:
        self.key, self.shape = key, shape
        numbers = shape.numbers(rng)
        self.setup: Setup = set_up(key, shape.program, numbers, 1.0, guide, bayesrl.objectives.ReverseKL(), 1)
        self.run = TrainingLoop(key, self.setup, default_optimizer(0.1, STEPS), STEPS, None, None, None)
        self.first = self.run.start()
        self.chunk = jax.jit(run_chunk)
        self.sites = all_assignments(shape)

    def start(self) -> FitState:
        """Return the state before the first step."""
        return self.first.train

    def steps(self, key: Array, state: FitState, beta: float, numbers: Any, num_steps: int) -> FitState:
        """Take steps on the program with these numbers."""
        keys = jax.random.split(key, 1)
        lanes = replace(self.first, train=state, beta=jnp.asarray([beta]), args=numbers)
        return self.chunk(keys, lanes, jnp.asarray(num_steps))[0]

    def posterior(self, state: FitState, beta: float, numbers: Any, history: np.ndarray | None = None) -> Fitted:
        """Make a posterior from a state, and enumerate the truth about it."""
        programs = replace(self.setup.programs, args=numbers)
        setup = replace(self.setup, programs=programs, betas=jnp.asarray([beta]))
        steps = int(state.step)
        rows = [
            {"step": np.asarray(steps * (i + 1) // 8), "skipped": np.zeros(1, int)}
            | {name: np.zeros(1) for name in ("loss", "reward", "kl", "spread", "grad_norm")}
            | {"objective": np.asarray([0.0 if history is None else history[i]])}
            for i in range(8)
        ]
        settings = {"num_steps": STEPS, "num_restarts": 1}
        made = posterior_of(self.key, setup, replace(self.first, train=state), rows, settings, beta, interrupted=False)
        log_q = log_q_of(made, self.sites)
        known = truth(self.shape, numbers, log_q, beta)
        return Fitted(made, known, beta, known.missed_mass)

    def fits(self, rng: np.random.Generator, count: int) -> Iterator[Fitted]:
        """Fit programs with random numbers, each at a β from .05 to 5 and for 3 to 400 steps."""
        for i in range(count):
            numbers = self.shape.numbers(rng)
            beta = float(np.exp(rng.uniform(np.log(0.05), np.log(5))))
            steps = int(np.exp(rng.uniform(np.log(3), np.log(STEPS))))
            state = self.steps(jax.random.fold_in(self.key, i), self.start(), beta, numbers, steps)
            yield self.posterior(state, beta, numbers)
