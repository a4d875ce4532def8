"""Gates, mixtures and circles are tilted part by part, and a zero tilt leaves the prior."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayesrl
from bayesrl.compilation.jit import closure_jit
from bayesrl.core.structure import finite_support, is_discrete
from bayesrl.errors import PolicyError
from bayesrl.guides.tilts.families import tilt_distribution, tilt_shape
from benchmarks.distributions import try_family

KEY = jax.random.key(0)
_weights = jnp.array([0.7, 0.3])

PRIORS = {
    "gated Poisson": dist.ZeroInflatedPoisson(0.3, 2.0),
    "gated by logits": dist.ZeroInflatedLogits(dist.Poisson(jnp.array([1.0, 3.0])), -1.0),
    "gated negative binomial": dist.ZeroInflatedNegativeBinomial2(2.0, 3.0, gate=0.2),
    "hurdle": dist.HurdlePoisson(gate=0.3, rate=2.0),
    "mixture": dist.MixtureSameFamily(dist.Categorical(probs=_weights), dist.Normal(jnp.array([-1.0, 2.0]), 0.5)),
    "mixture of a batch": dist.MixtureSameFamily(
        dist.Categorical(probs=_weights), dist.Normal(jnp.array([[-1.0, 2.0], [0.0, 1.0], [3.0, 4.0]]), 0.5)
    ),
    "mixture of counts": dist.MixtureSameFamily(dist.Categorical(probs=_weights), dist.Poisson(jnp.array([1.0, 6.0]))),
    "mixture of vectors": dist.MixtureSameFamily(
        dist.Categorical(probs=_weights), dist.Normal(jnp.zeros((2, 3)), jnp.array([[1.0], [2.0]])).to_event(1)
    ),
    "mixture of kinds": dist.MixtureGeneral(
        dist.Categorical(probs=_weights), [dist.Normal(0.0, 1.0), dist.Cauchy(2.0, 1.0)]
    ),
    "one event": dist.ZeroInflatedPoisson(jnp.full(3, 0.3), 2.0).to_event(1),
    "masked": dist.ZeroInflatedPoisson(jnp.full(2, 0.3), 2.0).mask(jnp.array([True, False])),
    "circle": dist.VonMises(jnp.array([0.5, -2.0]), 1.5),
}


def tilt_of(fn: Any, make: Any = jnp.zeros) -> Any:
    support = finite_support(fn) if is_discrete(fn) else None
    return tilt_distribution(fn, make((*fn.batch_shape, *tilt_shape("x", fn, support))), support)


def test_a_zero_tilt_leaves_the_prior() -> None:
    def compare() -> Any:
        found = {}
        for name, fn in PRIORS.items():
            moved, values = tilt_of(fn), fn.sample(KEY, (20,))
            assert (moved.batch_shape, moved.event_shape) == (fn.batch_shape, fn.event_shape), name
            found[name] = moved.log_prob(values), fn.log_prob(values), moved.sample(KEY, (20,)) - values
        return found

    for name, (ours, theirs, apart) in closure_jit(compare)().items():
        assert np.allclose(ours, theirs, atol=2e-4), name
        assert np.isfinite(np.asarray(apart)).all(), name


def test_tilted_counts_have_their_probabilities() -> None:
    counts = jnp.arange(200)

    def probabilities() -> Any:
        found = {}
        for name in ("gated Poisson", "gated negative binomial", "mixture of counts", "hurdle"):
            moved = tilt_of(PRIORS[name], lambda shape: 0.3 * jnp.ones(shape))
            found[name] = jnp.exp(moved.log_prob(counts)), jnp.exp(PRIORS[name].log_prob(counts))
        return found

    for name, (ours, prior) in closure_jit(probabilities)().items():
        assert float(ours.sum()) == pytest.approx(1.0, abs=1e-3), name
        assert float((prior * np.arange(200)).sum()) != pytest.approx(float((ours * np.arange(200)).sum()), rel=0.01)


def test_a_circle_is_tilted_by_its_cosine_and_sine() -> None:
    prior = dist.VonMises(0.5, 1.5)
    moved = tilt_distribution(prior, jnp.array([0.7, -1.2]), None)
    angles = jnp.linspace(-3, 3, 7)
    ratio = moved.log_prob(angles) - prior.log_prob(angles) - (0.7 * jnp.cos(angles) - 1.2 * jnp.sin(angles))
    assert np.ptp(np.asarray(ratio)) < 1e-5


def test_one_program_of_such_sites_reaches_its_optimum() -> None:
    """Each reward is β·log p₁/p₀ for another member p₁ of its family, so that J* is 0."""

    def moved(name: str, before: Any, after: Any) -> Any:
        x = numpyro.sample(name, before)
        return 0.5 * (after.log_prob(x) - before.log_prob(x))

    def policy() -> None:
        components = dist.Normal(jnp.array([-1.0, 1.0]), 0.5), dist.Normal(jnp.array([-1.0, 2.0]), 0.5)
        before, after = (
            dist.MixtureSameFamily(dist.Categorical(probs=jnp.array(weights)), parts)
            for weights, parts in zip(((0.7, 0.3), (0.3, 0.7)), components, strict=True)
        )
        parts = [
            moved("modes", before, after),
            moved("angle", dist.VonMises(0.0, 1.0), dist.VonMises(1.0, 2.0)),
        ]
        bayesrl.reward("r", sum(parts))

    posterior = bayesrl.fit(
        KEY, policy, beta=0.5, guide=bayesrl.guides.AutoTilt(tilt="constant"), num_steps=300, progress=False
    )
    start = float(posterior.history["objective"][0, 0])
    reached = posterior.estimate(KEY, 4000).objective
    assert abs(float(reached.mean[0])) < 0.01 * 0.6 + 4 * float(reached.se[0])
    assert start < -0.1


def test_what_no_tilt_is_known_for_is_refused_by_name() -> None:
    found = try_family("BetaNegativeBinomial", 10)
    assert found.outcome == "refused"
    assert "'x'" in found.words
    assert "by hand" in found.words


def test_one_name_is_one_plate() -> None:
    def policy() -> None:
        with numpyro.plate("n", 3, dim=-1):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", 3, dim=-2):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        bayesrl.reward("r", z.sum() + w.sum())

    with pytest.raises(PolicyError, match="'n' stands at axis -2"):
        bayesrl.fit(KEY, policy, beta=1.0, progress=False)
