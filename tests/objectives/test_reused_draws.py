"""Draws that serve several updates: the history tells of the policy that drew them, and no KL is negative."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers

import bayesrl
from bayesrl.compilation.jit import closure_jit
from bayesrl.errors import ObjectiveError
from bayesrl.objectives import BestOfN, ClippedKL, FDivergence, ForwardKL, RegularizedReward, ReverseKL
from bayesrl.objectives.numpyro_elbo import NumPyroELBO

UPDATES, PARTICLES, BETA = 3, 256, 0.5


@dataclass
class Held:
    """Hands one batch over for several updates, of each policy in turn; what a user might write."""

    batch: Any = None
    served: int = 0
    drawn_by: list[Any] = field(default_factory=list)

    def __call__(self, key: Any, params: Any, programs: Any) -> Any:
        if self.batch is None or self.served == UPDATES:
            draw = closure_jit(
                lambda key, params: programs.draw(key, params, PARTICLES, stopped=programs.structure.actions)
            )
            self.batch, self.served = draw(key, params), 0
        self.served += 1
        self.drawn_by.append(jax.tree.map(np.asarray, params))
        return self.batch


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
    bayesrl.reward("payoff", jnp.array([0.0, 1.0, 3.0])[arm])


def contexts() -> None:
    with numpyro.plate("n", 2) as i:
        arm = numpyro.sample("arm", dist.Bernoulli(0.3))
        bayesrl.reward("payoff", jnp.array([[0.0, 2.0], [1.0, -1.0]])[i, arm])


def discounted() -> None:
    for t in range(2):
        with handlers.scale(scale=0.5**t):
            arm = numpyro.sample(f"arm{t}", dist.Bernoulli(0.5))
        bayesrl.reward(f"payoff{t}", 0.5**t * (1.0 + t) * arm)


def with_data() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
    numpyro.sample("y", dist.Normal(1.0 * arm, 1.0), obs=1.5)
    bayesrl.reward("payoff", 1.0 * arm)


@pytest.mark.parametrize("objective", [ClippedKL(num_particles=PARTICLES), ReverseKL(PARTICLES, enumerated=())])
@pytest.mark.parametrize("program", [bandit, contexts, discounted, with_data])
def test_the_history_is_of_the_policy_that_drew(program: Callable[[], None], objective: Any) -> None:
    """Rows of one batch are alike; the first batch is of the start, the second of what three updates made of it."""
    if program in (discounted, with_data) and type(objective) is ReverseKL:
        pytest.skip("tried with the other objective")
    source = Held()
    posterior = bayesrl.fit(
        jax.random.key(0),
        program,
        beta=BETA,
        objective=objective,
        source=source,
        optimizer=optax.sgd(0.8),
        num_steps=2 * UPDATES,
        progress=False,
    )
    told = {name: np.asarray(posterior.history[name], float).reshape(-1) for name in ("objective", "reward", "kl")}
    assert len(told["kl"]) == 2 * UPDATES
    optimum = (
        float(np.mean(np.asarray(bayesrl.enumerate_posterior(program, beta=BETA).optimum)))
        if (program is not discounted)
        else np.inf
    )
    for start in (0, UPDATES):
        rows = slice(start, start + UPDATES)
        for values in told.values():
            np.testing.assert_allclose(values[rows], values[start], atol=1e-5)
        np.testing.assert_allclose(told["objective"][rows], told["reward"][rows] - BETA * told["kl"][rows], atol=1e-4)
        # J and KL of the policy that drew: 6 standard errors of 256 draws of numbers within 4 of each other.
        assert (told["objective"][rows] < optimum + 6 * 2 / np.sqrt(PARTICLES)).all()
        drawn = source.drawn_by[start]
        lane = jax.tree.map(lambda x: x[None], drawn)
        own = bayesrl.Posterior(**{**vars(posterior), "params": lane})
        exact = own.estimate(jax.random.key(1), 20_000)
        for name in told:
            mean, se = (float(np.ravel(part)[0]) for part in getattr(exact, name))
            spread = se * np.sqrt(20_000 / PARTICLES)
            assert abs(told[name][start] - mean) < 5 * np.hypot(spread, se) + 1e-5, name
    if program is not with_data:  # π₀ is what the guide starts at
        assert np.abs(told["kl"][:UPDATES]).max() < 1e-5
    assert told["kl"].min() > -1e-4


def mixed() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    bayesrl.reward("payoff", jnp.array([0.0, 1.0, 3.0])[arm] + x)


def test_objectives_of_the_fit_learn_from_a_source_by_scores() -> None:
    """Of their own draws they would enumerate the arm and differentiate through x: a source gives values alone."""
    options: dict[str, Any] = {"beta": BETA, "num_steps": 300, "progress": False}
    source = bayesrl.ReuseDraws(num_updates=1)
    fitted = bayesrl.fit(jax.random.key(0), mixed, source=source, **options)
    optimum = BETA * np.log(np.mean(np.exp([0, 1 / BETA, 3 / BETA]))) + 1 / (2 * BETA)
    told = fitted.estimate(jax.random.key(1), 4000).objective
    # At the optimum all draws have the same w, so that only what the fit has left shows.
    assert abs(float(told.mean[0]) - optimum) < 5 * float(told.se[0]) + 5e-3
    objective = RegularizedReward("chi_squared")
    other = bayesrl.fit(jax.random.key(0), bandit, objective=objective, source=source, **options)
    best = bayesrl.enumerate_posterior(bandit, beta=BETA, regularizer="chi_squared").optimum
    told = other.estimate(jax.random.key(1), 4000).objective
    assert abs(float(told.mean[0]) - float(best)) < 5 * float(told.se[0]) + 0.02


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (ForwardKL(), "ForwardKL weighs draws of a mixture of guide and prior, so it makes its own draws"),
        (FDivergence("jensen_shannon"), "FDivergence weighs draws of a mixture"),
        (BestOfN(4), "BestOfN ranks draws of the prior"),
        (NumPyroELBO(numpyro.infer.TraceGraph_ELBO()), "TraceGraph_ELBO makes its own draws"),
        (ReverseKL(enumerated=("arm",)), r"ReverseKL\(enumerated=\('arm',\)\) runs all values"),
        (RegularizedReward("chi_squared", enumerated=("arm",)), "leave enumerated= or source= out"),
        (ReverseKL(estimator="pathwise"), "estimator='pathwise' differentiates through the draws"),
    ],
)
def test_objectives_that_make_their_own_draws_refuse_a_source(objective: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        bayesrl.fit(
            jax.random.key(0), bandit, beta=BETA, objective=objective, source=bayesrl.ReuseDraws(), progress=False
        )
