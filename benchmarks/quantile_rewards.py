"""Texts whose log Z is known at any size: a reward that is uniform on [0, 1] under the model.

Each half of a text has a number: the probability that the model gives to what comes before it in a dictionary of all
that may stand there, Σ_t p(x_<t)·Σ_{v<x_t} p(v|x_<t), and half of its own. The two are uniform and independent whatever
the model, up to the cell of one half, and so is the reward, the distribution function of their sum. So
log Z = log β(e^{1/β} − 1). Random GPT-2s of 2 layers × 32, 32 tokens, write 8 tokens after random prompts of 3. Half of
the fits are the prior itself, of which J, the gap and both KLs to p* are known too; the others are fits of 40 steps.
Three β are bracketed, with a bound of 1 on the reward, which is given. Prompts are contexts: log Z is checked both of
each prompt and averaged over those of a model. Coverage has the 95% interval of a binomial share, which is too narrow
where brackets share draws, as those of the three β do. Calibrated intervals are over those that were given: averaged
over prompts they are so narrow that this few draws of p* would not show a small mode, and rejection then gives none.
The twist is the reward of the text so far: a half that is not yet written counts as 1/2.
"""

import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import beta as beta_law

import bayesrl
from bayesrl import lm
from bayesrl.lm.prompts import Completions
from bayesrl.lm.rewards.base import Reward
from benchmarks.results import table, target

MODELS, PROMPTS = 10, 20
VOCABULARY, LENGTH, PROMPT = 32, 8, 3
CONFIG = lm.GPT2Config(vocab_size=VOCABULARY, max_length=16, width=32, depth=2, heads=2, initializer_range=0.2)
BETAS = np.array([0.1, 0.3, 1.0])
TRUTH = np.log(BETAS * np.expm1(1 / BETAS))
DRAWS = {"rejection": 2**11, "smc": 2**9}
TWISTS = (None, "reward")
QUANTITIES = ("log_evidence", "objective", "gap", "kl_reverse", "kl_forward")
NAMES = ("log Z, averaged", "J", "gap", "KL(q‖p*)", "KL(p*‖q)")
LABELS = {**dict(zip(QUANTITIES, NAMES, strict=True)), "by_context": "log Z of each prompt"}


@dataclass(frozen=True, eq=False)
class Quantile(Reward):
    """The distribution function of the sum of a text's halves, each by its place in a model's dictionary."""

    model: Any
    separate = True

    def __call__(self, completions: Completions) -> jax.Array:
        """Return a number in [0, 1], [...]."""
        shape, steps = completions.index.shape, completions.tokens.shape[-1]
        rows = [x.reshape(-1, x.shape[-1]) for x in (completions.prompt, completions.prompt_mask, completions.tokens)]
        answers = lm.CausalLMDistribution(self.model, *rows[:2], num_steps=steps)
        probs = jnp.exp(answers.next_token_log_probs(rows[2]))  # [rows, T, V]
        below = jnp.where(jnp.arange(probs.shape[-1]) < rows[2][..., None], probs, 0.0).sum(-1)
        own = jnp.take_along_axis(probs, rows[2][..., None], -1)[..., 0]
        there = completions.mask.reshape(own.shape)
        first, second = (_place(below[:, part], own[:, part], there[:, part]) for part in halves(steps))
        total = first + second
        return jnp.where(total < 1, total**2 / 2, 1 - (2 - total) ** 2 / 2).reshape(shape)


def halves(steps: int) -> tuple[slice, slice]:
    """Return the halves of a text."""
    return slice(0, steps // 2), slice(steps // 2, steps)


def _place(below: jax.Array, own: jax.Array, there: jax.Array) -> jax.Array:
    """Return P(before) + P(own)/2, [rows], of tokens [rows, n]; tokens that are not there leave all open."""
    reached = jnp.cumprod(jnp.where(there, own, 1.0), -1)
    before = jnp.concatenate([jnp.ones((len(own), 1)), reached[:, :-1]], -1)
    return jnp.where(there, before * below, 0.0).sum(-1) + reached[:, -1] / 2


def run() -> str:
    """Bracket every prompt of every model."""
    found: dict[tuple[str, str], list[tuple[Any, ...]]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    forward: dict[Any, list[np.ndarray]] = defaultdict(list)
    cells = []
    for number in range(MODELS):
        key = jax.random.key(number)
        policy, posterior, is_prior = problem(key, number)
        for name, draws in DRAWS.items():
            began = time.perf_counter()
            own = jax.random.fold_in(key, 2)
            bracket = bayesrl.evidence(own, posterior, method=name, reward_bound=1.0, num_samples=draws)
            seconds[name] += time.perf_counter() - began
            _compare(found, name, bracket, is_prior=is_prior)
        for twist in TWISTS:
            options: dict[str, Any] = {"num_particles": 64, "num_replications": 8, "twist": twist}
            drawn = bayesrl.smc(jax.random.fold_in(key, 3), policy, beta=BETAS, **options)
            assert drawn.log_evidence is not None
            off = np.asarray(drawn.log_evidence.mean) - TRUTH[:, None]
            forward[twist].append(np.stack([off, np.asarray(drawn.log_evidence.se), np.asarray(drawn.ess)]))
        cells.append(_cell(policy))
        print(f"{number + 1} of {MODELS} models, {sum(seconds.values()):.0f} s", file=sys.stderr, flush=True)
    return _told(found, forward, seconds, max(cells))


def problem(key: jax.Array, number: int) -> tuple[Any, Any, bool]:
    """Make a random model with its reward, and a fit: every other one is the prior itself."""
    model = lm.GPT2.init(jax.random.fold_in(key, 0), CONFIG)
    prompts = np.asarray(jax.random.randint(jax.random.fold_in(key, 4), (PROMPTS, PROMPT), 0, VOCABULARY))
    policy = lm.policy(model, prompts, reward=Quantile(model), max_new_tokens=LENGTH)
    is_prior = number % 2 == 0
    posterior = bayesrl.fit(
        jax.random.fold_in(key, 1),
        policy,
        beta=BETAS,
        guide=lm.FullParameters(),
        objective=bayesrl.objectives.ReverseKL(num_particles=8),
        # With so small a rate the fit stays at the prior, to the last digit.
        learning_rate=1e-12 if is_prior else 1e-3,
        num_steps=1 if is_prior else 40,
        progress=False,
    )
    return policy, posterior, is_prior


def _cell(policy: Any) -> float:
    """Bound the relative error of Z that the cells of halves leave, E[p²]·(1/β² + 1/β)/24 of each, at the least β."""
    answers = policy.distribution(policy.model, policy.prompts.tokens, policy.prompts.mask)
    by_step = jax.jit(lambda key: answers.log_prob_by_step(answers.sample(key, (256,))))(jax.random.key(0))
    beta = BETAS.min()
    squares = sum(float(jnp.exp(2 * by_step[..., part].sum(-1)).mean()) for part in halves(LENGTH))
    return squares * (1 / beta**2 + 1 / beta) / 24


def _known(i: int, *, is_prior: bool) -> dict[str, float]:
    """Return what is known at one β."""
    beta, log_z = float(BETAS[i]), float(TRUTH[i])
    known = {"log_evidence": log_z}
    if is_prior:
        # E[R] under p* is d log Z / d(1/β) of log β(e^{1/β} − 1).
        reward = 1 / -np.expm1(-1 / beta) - beta
        known |= {"objective": 0.5, "gap": beta * log_z - 0.5, "kl_reverse": log_z - 0.5 / beta}
        known |= {"kl_forward": float(reward / beta - log_z)}
    return known


def _compare(found: dict[Any, list[tuple[Any, ...]]], method: str, bracket: Any, *, is_prior: bool) -> None:
    for i in range(len(BETAS)):
        for name, truth in _known(i, is_prior=is_prior).items():
            interval = getattr(bracket, name)
            ends = [float(np.asarray(getattr(interval, end))[i]) for end in ("lower", "upper")]
            safe = [float(np.asarray(getattr(interval, f"conservative_{end}"))[i]) for end in ("lower", "upper")]
            given = bool(np.isfinite(ends[1]))
            inside = ends[0] <= truth <= ends[1] if given else None
            found[method, name].append((inside, ends[1] - ends[0], safe[0] <= truth <= safe[1], safe[1] - safe[0]))
            if name == "log_evidence":
                each = [np.asarray(getattr(bracket.by_context, end))[i] for end in ("lower", "upper")]
                for low, high in np.stack(each, -1).tolist():
                    found[method, "by_context"].append((low <= truth <= high, high - low, None, None))


def _share(hits: Any) -> tuple[str, float]:
    """Return a share with its Clopper–Pearson interval, and the upper end."""
    hits = list(hits)
    good, num = sum(hits), len(hits)
    low = beta_law.ppf(0.025, good, num - good + 1) if good else 0.0
    high = beta_law.ppf(0.975, good + 1, num - good) if good < num else 1.0
    return f"{good / num:.1%} ({low:.1%} to {high:.1%})", float(high)


def _told(found: Any, forward: Any, seconds: dict[str, float], cell: float) -> str:
    rows, met = [], True
    for (method, name), values in found.items():
        inside, width, safe, wide = zip(*values, strict=True)
        given = [value for value in inside if value is not None]
        calibrated, most = _share(given) if given else ("none", 1.0)
        only_calibrated = name == "by_context"
        conservative, most_safe = ("none", 1.0) if only_calibrated else _share(safe)
        met &= most >= 0.93 and most_safe >= 0.94
        given_share = f"{len(given) / len(inside):.0%}"
        narrow = [w for w, value in zip(width, inside, strict=True) if value is not None]
        widths = [f"{np.median(narrow):.2g}" if narrow else "", "" if only_calibrated else f"{np.median(wide):.2g}"]
        rows.append([method, LABELS[name], len(inside), given_share, calibrated, widths[0], conservative, widths[1]])
    header = ["evidence by", "of", "brackets", "calibrated given", "it covers", "median width", "conservative covers"]
    particles = []
    for twist, values in forward.items():
        off, se, ess = (np.concatenate(part, -1).T for part in zip(*values, strict=True))  # [prompts, β]
        for i, beta in enumerate(BETAS):
            z = off[:, i] / se[:, i]
            particles.append(
                [
                    "none" if twist is None else twist,
                    f"{beta:g}",
                    f"{TRUTH[i]:.6f}",
                    f"{np.log(np.mean(np.exp(off[:, i]))) + TRUTH[i]:.6f}",
                    f"{np.exp(off[:, i]).std(ddof=1) / np.sqrt(len(off)):.1e}",
                    f"{np.sqrt(np.mean(off[:, i] ** 2)):.2g}",
                    f"{np.mean(np.abs(z) < 1.96):.1%}",
                    f"{np.median(ess[:, i]):.0f}",
                ]
            )
    columns = ["twist", "β", "log Z", "log of mean Ẑ", "s.e.", "root mean square error", "within 1.96 s.e.", "ESS"]
    words = [
        (__doc__ or "").partition("\n\n")[2].strip(),
        f"Cells change log Z by at most {cell:.0e}. {MODELS} models × {PROMPTS} prompts; "
        + ", ".join(
            f"{name}: {total / (MODELS * PROMPTS):.2f} s a prompt with up to {DRAWS[name]:,} draws at each β"
            for name, total in seconds.items()
        )
        + ", tracing included.",
        target(
            "no share below 93% (calibrated) or 94% (conservative) by more than its binomial error",
            met=met,
            why_not="see the table",
        ),
        "`smc` of 8 × 64 particles on the same prompts:",
        table(columns, particles),
    ]
    return "\n\n".join([table([*header, "median width"], rows), *words])
