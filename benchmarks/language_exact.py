"""Language models small enough to be enumerated: how near fits come, and what engines say of the evidence.

A random GPT-2 writes T tokens of V; the reward is that of another random transformer. Five seeds; the three β are
fitted side by side in one call, from β = 1 down for reverse KL (`start_beta`), which else leaves modes out. The share
is the exact gap over J* − J(π₀), by enumeration, whichever KL the fit minimised. Importance and rejection draw from
the reference.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bayesrl
from bayesrl import lm
from bayesrl.diagnostics.evidence.bounds import evaluate_fit
from bayesrl.lm import rewards
from bayesrl.lm.prompted_policy import PromptedPolicy
from benchmarks.language_models import BETA, CONFIG, policy_of
from benchmarks.results import table, target

SHAPES = ((8, 4), (20, 3))
BETAS = np.array([1.0, 0.3, 0.1])
SEEDS = 5
RATE = 1e-3
ROUNDING = 1e-3
"""Largest change of a reward by another order of sums."""

OBJECTIVES = {
    "reverse KL": bayesrl.objectives.ReverseKL(num_particles=256),
    "forward KL": bayesrl.objectives.ForwardKL(num_particles=256),
}
SETTINGS = {"reverse KL": (1500, 1.0), "forward KL": (1000, None)}
"""Number of steps, and the starting temperature."""

ALLOWED = {"reverse KL": 0.01, "forward KL": 0.02}


def run() -> str:
    """Fit every problem by both objectives, and compare the engines with the exact evidence."""
    shares: dict[tuple[str, int, float], list[float]] = {}
    covered: dict[str, list[bool]] = {"importance": [], "rejection": []}
    for shape in SHAPES:
        for seed in range(SEEDS):
            policy, bound = random_problem(seed, *shape)
            exact = bayesrl.enumerate_posterior(policy, beta=BETAS)
            for name, objective in OBJECTIVES.items():
                began = time.perf_counter()
                for beta, share in zip(BETAS, _shares(seed, policy, objective, *SETTINGS[name]), strict=True):
                    shares.setdefault((name, shape[0], float(beta)), []).append(share)
                print(f"V = {shape[0]}, seed {seed}, {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
            _cover(seed, policy, bound, np.ravel(exact.log_evidence.mean), covered)
    return _told(shares, covered)


def random_problem(seed: int, vocabulary: int, length: int) -> tuple[PromptedPolicy, float]:
    """Make a random transformer that writes and another that judges; also return its best reward of any sentence."""
    writer_key, judge_key, head_key = jax.random.split(jax.random.key(seed), 3)
    shape = {"vocab_size": vocabulary, "max_length": length + 1, "depth": 2, "heads": 4, "initializer_range": 0.2}
    writer = lm.GPT2.init(writer_key, lm.GPT2Config(width=64, **shape))
    judge = lm.GPT2.init(judge_key, lm.GPT2Config(width=32, **shape))
    head = jax.random.normal(head_key, (32,)) / np.sqrt(32)

    def judged(tokens: jax.Array, mask: jax.Array) -> jax.Array:
        told = jnp.concatenate([jnp.zeros(1, tokens.dtype), tokens])
        hidden, _ = judge.extend(told, jnp.ones(length + 1, bool), judge.start(length + 1))
        return hidden[-1] @ head

    prompt = np.zeros((1, 1), np.int32)
    sentences = lm.CausalLMDistribution(writer, prompt, num_steps=length).finite_values
    told = jax.jit(jax.vmap(judged))(jnp.asarray(sentences), jnp.ones((len(sentences), length), bool))
    made = lm.policy(writer, prompt, reward=rewards.token_reward(judged), max_new_tokens=length)
    return made, float(told.max()) + ROUNDING


def _shares(
    seed: int, policy: PromptedPolicy, objective: bayesrl.objectives.Objective, steps: int, start: float | None
) -> list[float]:
    posterior = bayesrl.fit(
        jax.random.key(seed),
        policy,
        beta=BETAS,
        guide=lm.FullParameters(),
        objective=objective,
        optimizer=optax.adam(optax.cosine_decay_schedule(RATE, steps)),
        num_steps=steps,
        start_beta=start,
        progress=False,
    )
    return np.atleast_1d(evaluate_fit(jax.random.key(100 + seed), posterior).relative_gap.mean).tolist()


def _cover(seed: int, policy: PromptedPolicy, bound: float, exact: np.ndarray, covered: dict[str, list[bool]]) -> None:
    """Record whether 95% intervals hold the exact evidence."""
    key = jax.random.key(200 + seed)
    found = bayesrl.importance(key, policy, beta=BETAS, num_samples=20_000)
    apart = np.abs(np.ravel(found.log_evidence.mean) - exact) / np.ravel(found.log_evidence.se)
    covered["importance"] += (apart < 1.96).tolist()
    for i, beta in enumerate(BETAS):
        lane = jax.random.fold_in(key, i)
        accepted = bayesrl.rejection(
            lane, policy, beta=float(beta), reward_bound=bound, num_samples=500, max_proposals=400_000
        )
        error = float(np.ravel(accepted.log_evidence.se)[0])
        covered["rejection"].append(bool(abs(float(np.ravel(accepted.log_evidence.mean)[0]) - exact[i]) < 1.96 * error))


def vowel_evidence() -> str:
    """Say what rejection can and cannot tell about the vowel task."""
    policy = policy_of(lm.GPT2.init(jax.random.key(0), CONFIG))
    try:
        accepted = bayesrl.rejection(jax.random.key(1), policy, beta=BETA, reward_bound=4.0)
        return f"accepted {accepted.log_weights.shape[0]:,} draws"
    except bayesrl.errors.EngineError as error:
        return str(error)


def _told(shares: dict[tuple[str, int, float], list[float]], covered: dict[str, list[bool]]) -> str:
    rows = [
        [name, f"V = {v}", f"{beta:g}", f"{np.median(found):.2%}", f"{max(found):.2%}"]
        for (name, v, beta), found in shares.items()
    ]

    def of(name: str) -> list[float]:
        return [share for (own, *_), found in shares.items() if own == name for share in found]

    words = [
        target(
            f"{name}: within {ALLOWED[name]:.0%} of J* − J(π₀) on every seed",
            met=all(share <= ALLOWED[name] for share in of(name)),
            why_not=f"the worst of {len(of(name))} fits is at {max(of(name)):.2%}",
        )
        for name in OBJECTIVES
    ]
    engines = [[name, f"{sum(found)} of {len(found)}"] for name, found in covered.items()]
    return "\n\n".join(
        [
            table(["objective", "", "β", "share, median", "worst of 5 seeds"], rows),
            table(["engine", "95% intervals that hold log Z"], engines),
            (__doc__ or "").partition("\n\n")[2].strip(),
            *words,
            f"Rejection on the vowel task of `language_speed` (β = .1): {vowel_evidence()}",
        ]
    )
