"""Characters of English as a Markov chain, rewarded for chosen letters: exact by transfer matrices."""

from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.contrib.control_flow import scan

import bayesrl

ALPHABET = " abcdefghijklmnopqrstuvwxyz"


def problem(*, text: str = "", letters: str = "aeiou", length: int = 32, beta: float = 1.0) -> bayesrl.Problem:
    """Make the problem.

    Args:
        text: path of a text file from which to estimate the bigrams; by default, the English of the
            standard library's `pydoc_data.topics`.
        letters: letters that earn a reward of 1 each.
        length: characters in a draw.
        beta: default temperature, reward units per nat.

    Raises:
        bayesrl.errors.PolicyError: `letters` has no letter of the alphabet, or `text` cannot be read.
    """
    chosen = np.array([character in letters.lower() for character in ALPHABET], float)
    if not chosen.any():
        raise bayesrl.errors.PolicyError(f"letters={letters!r} has no letter of {ALPHABET!r}; name at least one")
    bigrams = bigram_probabilities(read_text(text))
    logits, gain = jnp.log(jnp.asarray(bigrams)), jnp.asarray(chosen)

    def bigram_text() -> None:
        def step(previous: Array, _: None) -> tuple[Array, None]:
            character = numpyro.sample("character", dist.Categorical(logits=logits[previous]))
            bayesrl.reward("letters", gain[character])
            return character, None

        scan(step, jnp.asarray(0), None, length=int(length))

    def optimum(beta: float) -> float:
        return beta * log_evidence(bigrams, chosen / beta, int(length))

    # p* tilts each step by the future value of the next character, whatever came before it: offsets suffice.
    guide = bayesrl.guides.AutoTilt(tilt="constant")
    return bayesrl.Problem(
        bigram_text,
        beta=beta,
        fit_options={"num_steps": 1000, "guide": guide},
        optimum=optimum,
        engines={},
    )


def read_text(path: str) -> str:
    """Read a file, or the default text, as lower-case words with single spaces."""
    if path:
        try:
            raw = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise bayesrl.errors.PolicyError(f"text={path!r} cannot be read: {error}") from error
    else:
        raw = "\n".join(import_module("pydoc_data.topics").topics.values())
    return " ".join("".join(c if c in ALPHABET else " " for c in raw.lower()).split())


def bigram_probabilities(text: str) -> np.ndarray:
    """Estimate P(next | previous) with one added to each count, [27, 27]."""
    index = {character: i for i, character in enumerate(ALPHABET)}
    codes = np.array([index[c] for c in text])
    counts = np.ones((len(ALPHABET), len(ALPHABET)))
    np.add.at(counts, (codes[:-1], codes[1:]), 1)
    return counts / counts.sum(1, keepdims=True)


def log_evidence(bigrams: np.ndarray, tilt: np.ndarray, length: int) -> float:
    """Compute log Z = log(e₀ᵀ (P · diag(exp(tilt)))ᵀ 1) by products of transfer matrices, in nats."""
    transfer, vector, log_scale = bigrams * np.exp(tilt), np.ones(len(bigrams)), 0.0
    for _ in range(length):
        # Each product is rescaled, for the power itself would overflow at low temperatures.
        vector = transfer @ vector
        log_scale += np.log(vector.max())
        vector = vector / vector.max()
    return float(log_scale + np.log(vector[0]))


def decode(tokens: Array) -> str:
    """Spell one draw."""
    return "".join(ALPHABET[int(token)] for token in jax.device_get(tokens))
