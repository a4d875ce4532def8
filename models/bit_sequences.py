"""Bit sequences near hidden patterns: a sharp posterior with many modes, one action per word of bits."""

import math

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.contrib.control_flow import scan

import bayesrl
from bayesrl.errors import PolicyError
from bayesrl.objectives import TrajectoryBalance

MOST_SEQUENCES = 2**20
SYMBOLS = ("0000", "1111", "1100", "0011", "0110")
"""Modes are made of these, as in the paper with twice the width."""


def problem(
    *,
    length: int = 12,
    word: int = 2,
    modes: int = 4,
    seed: int = 0,
    beta: float = 0.1,
    steps: int = 2000,
    particles: int = 128,
) -> bayesrl.Problem:
    """Make the problem of Malkin, Jain, Bengio, Sun & Bengio (2022), section 5.3, small enough to enumerate.

    Each action appends a word of bits, uniform under the prior. The reward is −(Hamming distance to the nearest mode)
    / length.

    Args:
        length: bits of a sequence, a multiple of 4 and of `word`.
        word: bits of an action.
        modes: number of modes, drawn by `seed`.
        seed: of the modes.
        beta: default temperature, reward units per nat.
        steps: gradient steps.
        particles: sequences per step.

    Raises:
        PolicyError: the lengths do not divide, or there are no modes or too many sequences.
    """
    length, word, modes = int(length), int(word), int(modes)
    if length < 4 or word < 1 or length % 4 or length % word or 2**length > MOST_SEQUENCES:
        raise PolicyError(
            f"length={length} and word={word}: use a length of 4 to {int(math.log2(MOST_SEQUENCES))} bits that is a "
            "multiple of 4 and of word, such as length=12 and word=2"
        )
    if modes < 1:
        raise PolicyError(f"modes={modes}; use at least 1")
    targets = draw_modes(length, modes, int(seed))
    patterns, digits = jnp.asarray(targets), jnp.arange(word - 1, -1, -1)

    def bit_sequences() -> None:
        def step(_: None, __: None) -> tuple[None, Array]:
            value = numpyro.sample("word", dist.Categorical(logits=jnp.zeros(2**word)))
            return None, value

        _, words = scan(step, None, None, length=length // word)
        bits = (words[:, None] >> digits & 1).reshape(length)
        distance = (bits != patterns).sum(-1).min()
        bayesrl.reward("closeness", -distance / length)
        numpyro.deterministic("distance", distance)

    def optimum(beta: float) -> float:
        rewards = -distances(targets) / length
        return float(beta * np.log(np.mean(np.exp(rewards / beta))))

    fit_options = {"objective": TrajectoryBalance(num_particles=int(particles)), "num_steps": int(steps)}
    return bayesrl.Problem(
        bit_sequences,
        beta=beta,
        fit_options=fit_options,
        optimum=optimum,
        about=f"{length} bits in words of {word}, near one of {modes} patterns",
    )


def draw_modes(length: int, count: int, seed: int) -> np.ndarray:
    """Draw modes, each a sequence of symbols, [count, length]."""
    symbols = np.array([[int(bit) for bit in symbol] for symbol in SYMBOLS])
    chosen = np.random.default_rng(seed).integers(len(symbols), size=(count, length // symbols.shape[1]))
    modes: np.ndarray = symbols[chosen].reshape(count, length)
    return modes


def distances(modes: np.ndarray) -> np.ndarray:
    """Compute Hamming distances to the nearest mode, [2 ** length], of all sequences as binary numbers."""
    length = modes.shape[1]
    bits = np.arange(2**length)[:, None] >> np.arange(length - 1, -1, -1) & 1
    found = np.full(len(bits), length)
    for mode in modes:
        found = np.minimum(found, (bits != mode).sum(-1))
    return found
