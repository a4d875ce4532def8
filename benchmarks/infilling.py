"""Infilling: fifteen letters that must end as given, by fitted twists, reverse KL and a plain policy gradient.

A GPT-2 of two blocks, 32 wide, is trained on the letters of `pydoc_data`, the documentation in the standard library.
For each of four beginnings it writes fifteen letters, and the reward is its own log-probability of the given ending
behind them, β = 1: p* is its law of the letters between beginning and ending. Endings are drawn from the model behind
fifteen letters of its own, so that these letters are an exact draw of p*. Every fit trains all parameters of a copy of
the model (twists with a head beside it), with as many steps, texts and calls of the reward, by Adam with one rate.
KL(q‖p*) = log Z − J and KL(p*‖q) = E_p*[log π₀ + R − log q] − log Z, nats, means over the four endings. Draws of p* are
2,000 particles of the contrastive twist, weighted; log Z is the mean of four runs of 500.
"""

import re
import sys
import time
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bayesrl
from bayesrl import lm
from bayesrl.exact.tabulation import freeze_program
from bayesrl.monte_carlo.particles.engines import ParticleOptions
from bayesrl.monte_carlo.sequential_monte_carlo import choose_engine
from bayesrl.objectives import ContrastiveTwist, ReverseKL, SoftValueRegression
from benchmarks.results import table, target

LENGTH, ENDING = 15, 6
BEGINNINGS = ["the value ", "a class is ", "if an object ", "this function "]
STEPS, TEXTS = 600, 64
PARTICLES, RUNS = 500, 4

FITS: dict[str, tuple[Any, float]] = {
    "contrastive twist": (ContrastiveTwist(TEXTS), 2e-3),
    "soft-value regression": (SoftValueRegression(TEXTS), 2e-3),
    "reverse KL": (ReverseKL(TEXTS), 2e-3),
    "plain policy gradient": (ReverseKL(TEXTS, estimator="score", baseline="none"), 2e-3),
}


@dataclass(frozen=True, eq=False)
class EndsAs(lm.rewards.Reward):
    """The log-probability of a given ending behind a completion, one ending for each prompt."""

    model: Any
    endings: Any  # [prompts, C]
    separate = True

    def __call__(self, completions: Any) -> jax.Array:
        """Return nats, [...]."""
        whole = jnp.concatenate([completions.prompt, completions.tokens], -1)
        mask = jnp.concatenate([completions.prompt_mask, completions.mask], -1)
        behind = lm.CausalLMDistribution(self.model, whole, mask, num_steps=self.endings.shape[-1])
        return behind.log_prob(jnp.asarray(self.endings)[completions.index])


class Task(NamedTuple):
    """The policy, an exact draw of p* for each prompt, [prompts, T], and both as texts."""

    policy: Any
    exact: np.ndarray
    texts: list[tuple[str, str]]


def make_task() -> Task:
    """Train the model, and let it write letters and endings."""
    corpus = re.sub("[^a-z]+", " ", " ".join(topics.values()).lower())
    tokenizer = lm.char_tokenizer("abcdefghijklmnopqrstuvwxyz ")
    shape = {"length": 32, "width": 32, "depth": 2, "batch_size": 32}
    trained = lm.train_small_lm(jax.random.key(0), "pydoc_letters", corpus, tokenizer, num_steps=2000, **shape)
    prompts = lm.encode_prompts(BEGINNINGS, tokenizer)
    whole = lm.CausalLMDistribution(trained.model, prompts.tokens, prompts.mask, num_steps=LENGTH + ENDING)
    written = np.asarray(jax.jit(whole.sample)(jax.random.key(1)))
    reward = EndsAs(trained.model, written[:, LENGTH:])
    policy = lm.policy(trained, prompts, reward=reward, max_new_tokens=LENGTH, stop_at_eos=False)
    pair = zip(tokenizer.decode(written[:, :LENGTH]), tokenizer.decode(written[:, LENGTH:]), strict=True)
    return Task(policy, written[:, :LENGTH], list(pair))


def run() -> str:
    """Fit by every row, and measure both divergences from the same log Z and draws of p*."""
    task = make_task()
    fits, seconds = {}, {}
    for name, (objective, rate) in FITS.items():
        options = {"objective": objective, "num_steps": STEPS, "learning_rate": rate, "progress": False, "beta": 1.0}
        start = time.perf_counter()
        fit = bayesrl.fit if isinstance(objective, ReverseKL) else bayesrl.fit_twist
        fits[name] = fit(jax.random.key(2), task.policy, guide=lm.FullParameters(), **options)
        seconds[name] = time.perf_counter() - start
        print(name, f"{seconds[name]:.0f} s", file=sys.stderr, flush=True)
    twist = fits["contrastive twist"]
    found = bayesrl.smc(
        jax.random.key(3), task.policy, beta=1.0, twist=twist, num_particles=PARTICLES, num_replications=RUNS
    )
    log_z, sides = found.log_evidence.mean, _sides(task, twist)
    texts = {"text": found.sites["text"]}
    weights = np.exp(found.log_weights - np.logaddexp.reduce(found.log_weights, 0))
    target_score = _target_scores(task, texts["text"])
    rows, divergences = [], {}
    for name, fitted in fits.items():
        estimate = fitted.estimate(jax.random.key(4), 2000)
        log_q = np.asarray(fitted.log_prob(texts)[0], float)
        reverse = float(log_z.mean() - estimate.objective.mean[0])
        forward = float((weights * (target_score - log_q)).sum(0).mean() - log_z.mean())
        divergences[name] = reverse, forward
        row = [f"{reverse:.2f} ± {float(estimate.objective.se[0]):.2f}", f"{forward:.2f}"]
        rows.append([name, *row, f"{STEPS * TEXTS * len(BEGINNINGS):,}", f"{seconds[name]:.0f}"])
        print(rows[-1], file=sys.stderr, flush=True)
    prior = float(found.estimates.kl.mean.mean())
    return _told(task, rows, divergences, sides, found, prior)


def _sides(task: Task, twist: Any) -> tuple[float, float]:
    """Return what forward runs and runs that hold the exact draw say of log Z, mean over prompts and runs, nats."""
    options = ParticleOptions(PARTICLES, RUNS, 0.5, "systematic", twist)
    engine = choose_engine(freeze_program(task.policy, (), 1.0), None, "auto", options)
    held = {"text": np.broadcast_to(task.exact, (RUNS, *task.exact.shape))}
    means = []
    for i, reference in enumerate((None, held)):
        _, log_weights = engine.run(jax.random.key(10 + i), 1.0, reference)
        by_run = log_weights.reshape(RUNS, PARTICLES, -1)
        means.append(float((np.logaddexp.reduce(by_run, 1) - np.log(PARTICLES)).mean()))
    return means[0], means[1]


def _target_scores(task: Task, texts: Any) -> np.ndarray:
    """Return log π₀ + R of texts, [draws, prompts], nats."""
    policy, prompts = task.policy, task.policy.prompts
    reward = policy.rewards["reward"]
    written = policy.distribution(policy.model, prompts.tokens, prompts.mask)

    def one(tokens: jax.Array) -> jax.Array:
        index = jnp.arange(len(prompts))
        there = jnp.ones(tokens.shape, bool)
        completions = lm.prompts.Completions(index, prompts.tokens, prompts.mask, tokens, there, prompts.examples)
        return written.log_prob(tokens) + reward(completions)

    return np.asarray(jax.jit(lambda x: jax.lax.map(one, x, batch_size=50))(jnp.asarray(texts)), float)


def _told(
    task: Task, rows: list[Any], divergences: dict[str, Any], sides: tuple[float, float], found: Any, prior: float
) -> str:
    header = ["fit", "KL(q‖p*)", "KL(p*‖q)", "calls of the reward", "seconds"]
    best, *others = (divergences[name] for name in ("contrastive twist", "reverse KL", "plain policy gradient"))
    met = all(best[i] < other[i] for other in others for i in (0, 1))
    shown = ", ".join(f"`{text}`**`{end}`**" for text, end in task.texts)
    words = [
        (__doc__ or "").partition("\n\n")[2].strip(),
        f"The exact draws and their endings: {shown}.",
        f"log Z is {found.log_evidence.mean.mean():.3f} (lower side {sides[0]:.3f}, upper side {sides[1]:.3f}); "
        f"KL(p*‖π₀) is {prior:.2f}; {found.ess.mean():.0f} of {len(found.log_weights):,} particles are effective.",
        target("both divergences of the contrastive twist beneath those of the last two rows", met=met),
    ]
    return "\n\n".join([table(header, rows), *words])
