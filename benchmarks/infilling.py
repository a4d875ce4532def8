"""Infilling: fifteen letters that must end as given, by fitted twists, reverse KL and a plain policy gradient.

A GPT-2 of two blocks, 32 wide, is trained on the letters of `pydoc_data`, the documentation in the standard library.
For each of two beginnings it writes fifteen letters, and the reward is its own log-probability of the given ending
behind them, β = 1: p* is its law of the letters between beginning and ending. Endings are drawn from the model behind
fifteen letters of its own. The reward counts from that of letters drawn evenly, 6·log 27 nats higher, which changes
neither p* nor J* − J: a soft value is learnt with its absolute size, and nearer to 0 it is learnt sooner. Every fit
trains all parameters of a copy of the model (twists with a head beside it), with as many steps, texts and calls of the
reward, by Adam; its first rate was chosen for each by J.

KL(q‖p*) = E_q[log q − log π₀ − R] + log Z and KL(p*‖q) = E_p*[log π₀ + R − log q] − log Z, nats, means over endings.
Draws of p* are those of all fits and of the prior together, weighted by p* over the even mixture of them, so that no
method has a reference of its own; log Z is the logarithm of the mean weight. Of draws by 16 particles of one run the
two divergences are bounded from above by what runs say of log Z, those that hold a draw of p* for the second.
"""

import math
import re
import sys
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
BEGINNINGS = ["the value ", "a class is "]
STEPS, TEXTS, DRAWS = 600, 64, 2000
PARTICLES, RUNS = 16, 128
LETTERS = "abcdefghijklmnopqrstuvwxyz "

FITS: dict[str, tuple[Any, float]] = {
    "contrastive twist": (ContrastiveTwist(TEXTS), 1e-3),
    "soft-value regression": (SoftValueRegression(TEXTS, prior_fraction=0.1), 2e-3),
    "soft-value regression, half from the prior": (SoftValueRegression(TEXTS, prior_fraction=0.5), 2e-3),
    "reverse KL": (ReverseKL(TEXTS), 2e-3),
    "plain policy gradient": (ReverseKL(TEXTS, estimator="score", baseline="none"), 5e-4),
}
"""Objectives and rates: of 5e-4, 1e-3, 2e-3 and 3e-3, where they were tried, those with the greatest J."""
TWISTS = tuple(FITS)[:3]


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
        return behind.log_prob(jnp.asarray(self.endings)[completions.index]) + ENDING * math.log(len(LETTERS))


class Task(NamedTuple):
    """The policy, and for each prompt the letters that the ending was drawn behind, with the ending."""

    policy: Any
    texts: list[tuple[str, str]]


def make_task() -> Task:
    """Train the model, and let it write letters and endings."""
    corpus = re.sub("[^a-z]+", " ", " ".join(topics.values()).lower())
    tokenizer = lm.char_tokenizer(LETTERS)
    shape = {"length": 32, "width": 32, "depth": 2, "batch_size": 32}
    trained = lm.train_small_lm(jax.random.key(0), "pydoc_letters", corpus, tokenizer, num_steps=2000, **shape)
    prompts = lm.encode_prompts(BEGINNINGS, tokenizer)
    whole = lm.CausalLMDistribution(trained.model, prompts.tokens, prompts.mask, num_steps=LENGTH + ENDING)
    written = np.asarray(jax.jit(whole.sample)(jax.random.key(1)))
    reward = EndsAs(trained.model, written[:, LENGTH:])
    policy = lm.policy(trained, prompts, reward=reward, max_new_tokens=LENGTH, stop_at_eos=False)
    pair = zip(tokenizer.decode(written[:, :LENGTH]), tokenizer.decode(written[:, LENGTH:]), strict=True)
    return Task(policy, list(pair))


class Reference(NamedTuple):
    """Weighted draws of p*.

    Attributes:
        texts: [draws, prompts, T].
        target: log π₀ + R, nats, [draws, prompts].
        log_q: by fit, [fits, draws, prompts].
        log_prior: [draws, prompts].
        weights: Σ = 1 for each prompt, [draws, prompts].
        log_z: nats, [prompts].
    """

    texts: np.ndarray
    target: np.ndarray
    log_q: np.ndarray
    log_prior: np.ndarray
    weights: np.ndarray
    log_z: np.ndarray


def run() -> str:
    """Fit by every row, and measure both divergences from the same log Z and draws of p*."""
    task = make_task()
    fits = {}
    for name, (objective, rate) in FITS.items():
        options = {"objective": objective, "num_steps": STEPS, "learning_rate": rate, "progress": False, "beta": 1.0}
        fit = bayesrl.fit if isinstance(objective, ReverseKL) else bayesrl.fit_twist
        fits[name] = fit(jax.random.key(2), task.policy, guide=lm.FullParameters(), **options)
        print(name, file=sys.stderr, flush=True)
    reference = make_reference(task, fits)
    calls = f"{STEPS * TEXTS * len(BEGINNINGS):,}"
    rows, divergences = [], {}
    for at, name in enumerate(fits):
        own = slice(at * DRAWS, (at + 1) * DRAWS)
        behind = (reference.log_q[at, own] - reference.target[own]).mean(-1) + reference.log_z.mean()
        forward = (reference.weights * (reference.target - reference.log_q[at])).sum(0) - reference.log_z
        divergences[name] = float(behind.mean()), float(forward.mean())
        se = f"{divergences[name][0]:.2f} ± {behind.std(ddof=1) / np.sqrt(DRAWS):.2f}"
        rows.append([name, se, f"{divergences[name][1]:.2f}", calls])
        print(rows[-1], file=sys.stderr, flush=True)
    for name in (*TWISTS[:2], "reverse KL"):
        label = f"{name}, draws by {PARTICLES} particles"
        divergences[label] = _of_particles(task, fits[name], reference, is_twist=name in TWISTS)
        shown = [f"≤ {value:.2f}" for value in divergences[label]]
        rows.append([label, *shown, f"{calls}, and {PARTICLES} for each draw"])
    return _told(task, rows, divergences, reference)


def make_reference(task: Task, fits: dict[str, Any]) -> Reference:
    """Weigh draws of all fits and of the prior by p* over their mixture."""
    parts = [np.asarray(fit.sample(jax.random.key(4 + at), DRAWS)["text"])[0] for at, fit in enumerate(fits.values())]
    prior = bayesrl.importance(jax.random.key(3), task.policy, beta=1.0, num_samples=DRAWS)
    texts = np.concatenate([*parts, np.asarray(prior.sites["text"])])
    scores = [jax.tree.map(lambda x: np.asarray(x[0], float), fit.scores({"text": texts})) for fit in fits.values()]
    log_q = np.stack([one.log_q for one in scores])
    log_prior, target = scores[0].log_prior, scores[0].log_prior + scores[0].reward
    log_w = target - np.logaddexp.reduce([*log_q, log_prior]) + np.log(len(fits) + 1)
    log_z = np.logaddexp.reduce(log_w, 0) - np.log(len(texts))
    return Reference(texts, target, log_q, log_prior, np.exp(log_w - log_z) / len(texts), log_z)


def _of_particles(task: Task, fitted: Any, reference: Reference, *, is_twist: bool) -> tuple[float, float]:
    """Bound both divergences of draws by particles: from runs that are free, and from runs that hold a draw of p*."""
    options = ParticleOptions(PARTICLES, RUNS, 0.5, "systematic", fitted if is_twist else None)
    proposal = None if is_twist else fitted
    engine = choose_engine(freeze_program(task.policy, (), 1.0), proposal, "auto", options)
    rng = np.random.default_rng(0)
    columns = [rng.choice(len(reference.texts), RUNS, p=weights) for weights in reference.weights.T]
    held = np.stack([reference.texts[chosen, at] for at, chosen in enumerate(columns)], 1)  # [runs, prompts, T]
    means = []
    for i, given in enumerate((None, {"text": held})):
        _, log_weights = engine.run(jax.random.key(10 + i), 1.0, given)
        by_run = np.logaddexp.reduce(log_weights.reshape(RUNS, PARTICLES, -1), 1) - np.log(PARTICLES)
        means.append(float((by_run.mean(0) - reference.log_z).mean()))
    return -means[0], means[1]


def _told(task: Task, rows: list[Any], divergences: dict[str, Any], reference: Reference) -> str:
    header = ["fit", "KL(q‖p*)", "KL(p*‖q)", "calls of the reward"]
    others = [divergences[name] for name in ("reverse KL", "plain policy gradient")]
    under = [name for name, own in divergences.items() if all(own[i] < one[i] for one in others for i in (0, 1))]
    alone = [name for name in under if name in TWISTS]
    together = [name for name in under if name.startswith(TWISTS) and name not in TWISTS]
    shown = ", ".join(f"`{text}`**`{end}`**" for text, end in task.texts)
    prior = (reference.weights * (reference.target - reference.log_prior)).sum(0) - reference.log_z
    ess = 1 / (reference.weights**2).sum(0)
    words = [
        (__doc__ or "").partition("\n\n")[2].strip(),
        f"The letters that were drawn, and the endings: {shown}.",
        f"log Z is {reference.log_z.mean():.3f}; KL(p*‖π₀) is {prior.mean():.2f}; "
        f"{ess.min():.0f} of {len(reference.texts):,} weighted draws are effective, at least.",
        target("both divergences of draws by a fitted twist beneath those of reverse KL and of the plain gradient",
               met=bool(alone or together), why_not="see the table"),
        f"Of the proposals alone: {' and '.join(alone) or 'none'}; by {PARTICLES} particles: "
        f"{' and '.join(together) or 'none'}. A contrast learns from few of its draws, those that p* would have, and "
        "covers p*; soft values learn from every draw, and lead to it; the plain gradient stays near the prior.",
    ]  # fmt: skip
    return "\n\n".join([table(header, rows), *words])
