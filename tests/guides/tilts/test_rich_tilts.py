"""Tilts that bend draws and weigh counts: densities, starts at the prior, and p* that no affine map holds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats
from scipy.special import logsumexp

import bayesrl
from bayesrl.compilation.jit import closure_jit
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import finite_support, inspect, is_discrete
from bayesrl.core.trace import site_log_prob, trace_program
from bayesrl.errors import GuideError, PolicyError
from bayesrl.guides.tilts.conjugacy import conjugate_sites
from bayesrl.guides.tilts.families import PriorRange, tilt_distribution, tilt_shape
from bayesrl.guides.tilts.reweighted_counts import ReweightedCounts
from bayesrl.guides.tilts.sinh_arcsinh import SinhArcsinh
from bayesrl.jaxprs.dataflow import count_dependent_numbers
from bayesrl.jaxprs.polynomial_degrees import NOT_POLYNOMIAL, input_degrees

KEY = jax.random.key(0)


def test_a_bend_has_its_inverse_and_slope() -> None:
    """And it changes nothing where nothing is bent: 300 points, far into both tails."""
    rng = np.random.default_rng(0)
    z = jnp.asarray(np.concatenate([rng.normal(size=200), 1e4 * rng.standard_cauchy(100)])[:, None], jnp.float32)
    centre, width = jnp.array([0.3]), jnp.array([2.0])

    def both(numbers: Any) -> Any:
        bend = SinhArcsinh(numbers, centre, width)
        s, log_slope = bend.forward(z)
        slope = jax.vmap(jax.grad(lambda one: bend.forward(one[None])[0].sum()))(z)
        return s, log_slope, slope, bend.inverse(s)[0]

    order = np.argsort(np.asarray(z)[:, 0])
    for numbers in (
        [0.0, 0.0, 0.0, 0.0],
        [0.7, -0.4, 0.5, -1.0],
        [-1.5, 0.3, -2.0, 1.0],
        [0.0, 1.5, 0.0, 0.0],
        [2.5, -2.0, 5.0, 2.0],
        [30.0, -9.0, 0.0, -9.0],
        [-30.0, -9.0, 0.0, 9.0],
    ):
        s, log_slope, slope, again = (np.asarray(x) for x in closure_jit(both)(jnp.array(numbers)))
        np.testing.assert_allclose(log_slope, np.log(slope), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(again, z, rtol=1e-4, atol=1e-4)
        assert (np.diff(s[order, 0]) >= 0).all()
        if not any(numbers):
            np.testing.assert_allclose(s, z, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(log_slope, 0.0, atol=1e-6)


RICH: dict[str, Any] = {
    "Normal": dist.Normal(1.0, 2.0),
    "Gamma": dist.Gamma(3.0, 2.0),
    "Uniform": dist.Uniform(-1.0, 3.0),
    "Cauchy": dist.Cauchy(jnp.array([0.0, 3.0]), 2.0),
    "VonMises": dist.VonMises(0.5, 1.5),
    "Poisson": dist.Poisson(3.0),
    "Binomial": dist.Binomial(7, 0.4),
    "ZeroInflated": dist.ZeroInflatedDistribution(dist.Geometric(0.3), gate=0.3),
    "events": dist.Geometric(jnp.array([0.2, 0.4])).to_event(1),
    "masked": dist.Geometric(0.3).expand([2]).mask(jnp.array([True, False])),
}


@pytest.mark.parametrize("name", RICH)
def test_a_rich_tilt_starts_at_the_prior_and_is_a_density(name: str) -> None:
    """E_π₀[q/π₀] = 1 of another tilt, within 5 standard errors of 20,000 draws (false alarms 6e-7 each)."""
    fn = RICH[name]
    support = finite_support(fn) if is_discrete(fn) else None
    reach = PriorRange(centre=0.2, width=0.7, window=(0, 12) if is_discrete(fn) else None)
    shape = (*fn.batch_shape, *tilt_shape("x", fn, support, reach))
    other = 0.25 * jnp.sin(1.0 + jnp.arange(float(np.prod(shape)))).reshape(shape)

    def scores() -> Any:
        draws = fn.sample(KEY, (20_000,))
        plain, moved = (tilt_distribution(fn, theta, support, reach) for theta in (jnp.zeros(shape), other))
        return fn.log_prob(draws), plain.log_prob(draws), moved.log_prob(draws), moved.sample(KEY, (7,))

    prior, plain, moved, sample = closure_jit(scores)()
    assert sample.shape == (7, *fn.batch_shape, *fn.event_shape)
    np.testing.assert_allclose(plain, prior, rtol=1e-5, atol=1e-4)
    ratio = np.exp(np.asarray(moved - prior, float)).reshape(20_000, -1)[:, 0]
    assert ratio.std() > 1e-2
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / 20_000**0.5


def test_a_window_between_knots() -> None:
    """500 counts, 64 weights: those between lie on straight lines, and all masses add up to 1."""
    weights = jnp.sin(jnp.arange(64.0) / 5)
    guide = ReweightedCounts(dist.Poisson(200.0), weights, 20, 500)
    counts = np.arange(0, 700)
    mass = np.exp(np.asarray(closure_jit(lambda: guide.log_prob(jnp.asarray(counts)))(), float))
    assert mass.sum() == pytest.approx(1.0, abs=1e-3)
    lines = np.interp(np.arange(20, 520), np.linspace(20, 519, 64), np.asarray(weights))
    log_mass = stats.poisson(200).logpmf(np.arange(20, 520)) + lines
    np.testing.assert_allclose(mass[20:520], np.exp(log_mass - logsumexp(log_mass)), atol=1e-5)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (dist.ImproperUniform(dist.constraints.real, (), ()), "no sampler.*obs="),
        (dist.ImproperUniform(dist.constraints.positive, (), ()).expand([3]), "no sampler.*obs="),
        (dist.LeftCensoredDistribution(dist.Normal(), jnp.array(False)), "LeftCensored.*inside of it"),
        (dist.RightCensoredDistribution(dist.Exponential(), jnp.array(True)), "RightCensored.*inside of it"),
        (
            dist.RightCensoredDistribution(dist.Exponential(jnp.ones(2)), jnp.array([True, False])).to_event(1),
            "RightCensored.*inside of it",
        ),
        (
            dist.IntervalCensoredDistribution(dist.Normal(), jnp.array(False), jnp.array(False)),
            "IntervalCensored.*inside of it",
        ),
        (dist.TransformedDistribution(dist.Normal(), dist.transforms.AbsTransform()), "FoldedDistribution"),
        (
            dist.TransformedDistribution(dist.Normal(jnp.zeros(2)), dist.transforms.AbsTransform()).to_event(1),
            "FoldedDistribution",
        ),
    ],
)
def test_what_cannot_be_drawn_or_has_no_density_is_refused_by_name(fn: Any, words: str) -> None:
    def policy() -> None:
        bayesrl.reward("r", 0.0 * jnp.sum(numpyro.sample("odd", fn)))

    with pytest.raises((GuideError, PolicyError), match=f"'odd'.*{words}"):
        bayesrl.fit(KEY, policy, beta=1.0, num_steps=1, progress=False)


@pytest.mark.parametrize(
    "fn",
    [
        dist.FoldedDistribution(dist.Normal(0.5, 1.0)),
        dist.FoldedDistribution(dist.StudentT(4.0)).expand([3]),
        dist.FoldedDistribution(dist.Normal(jnp.zeros(3), 1.0)).to_event(1),
        dist.FoldedDistribution(dist.Laplace(jnp.ones(3), 1.0)).mask(jnp.array([True, False, True])),
        dist.MixtureSameFamily(
            dist.Categorical(probs=jnp.array([0.3, 0.7])), dist.FoldedDistribution(dist.Normal(jnp.array([0.0, 2.0])))
        ),
    ],
    ids=["alone", "expanded", "vector", "masked", "mixed"],
)
def test_a_density_that_does_not_read_what_its_draw_computed(fn: Any) -> None:
    """The site scores its draw, as NumPyro's own density does."""

    def program() -> Any:
        site = trace_program(FoldedKeys(lambda: numpyro.sample("x", fn), KEY)).sites["x"]
        return site_log_prob(site), fn.log_prob(site.value)

    np.testing.assert_allclose(*closure_jit(program)(), rtol=1e-6)


def grid_of(prior: Any, num: int = 20_001) -> tuple[np.ndarray, np.ndarray]:
    """Values that stand for equal shares of a prior of SciPy."""
    share = (np.arange(num) + 0.5) / num
    return prior.ppf(share), np.full(num, -np.log(num))


def test_one_program_of_what_no_affine_map_holds() -> None:
    """Independent sites with rewards of all kinds; the gain and log Z of each by quadrature or sums in double precision.

    By location and scale, or by a natural tilt alone, a good part of the gain of each of these is left. J is exact to its
    standard error, 5 of which are allowed (6e-7).
    """
    counts = np.arange(200)
    sites: dict[str, tuple[Any, Any, Any]] = {
        "normal": (dist.Normal(0.0, 1.0), lambda x: 2 * jnp.tanh(2 * x), grid_of(stats.norm())),
        "uniform": (dist.Uniform(0.0, 1.0), lambda x: -30 * (x - 0.8) ** 2, grid_of(stats.uniform())),
        "count": (dist.Geometric(0.3), lambda x: -0.6 * (x - 5.0) ** 2, (counts, counts * np.log(0.7))),
    }

    def policy() -> None:
        for name, (prior, worth, _) in sites.items():
            bayesrl.reward(f"{name} worth", 0.5 * worth(jnp.asarray(numpyro.sample(name, prior), float)))

    optimum, gain = 0.0, 0.0
    for _, worth, (values, weights) in sites.values():
        reward = np.asarray(worth(jnp.asarray(values)), float)
        log_mass = weights - logsumexp(weights)
        log_z = logsumexp(log_mass + reward)
        optimum, gain = optimum + 0.5 * log_z, gain + 0.5 * (log_z - float(np.exp(log_mass) @ reward))
    guide = bayesrl.guides.AutoTilt(tilt="constant")
    posterior = bayesrl.fit(KEY, policy, beta=0.5, guide=guide, num_steps=600, progress=False)
    reached = posterior.estimate(jax.random.key(1), 20_000).objective
    left = optimum - float(reached.mean[0])
    assert -5 * float(reached.se[0]) - 1e-3 * gain < left < 0.01 * gain + 5 * float(reached.se[0])


CONJUGATE: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "normal, quadratic": (lambda s: -((s("x", dist.Normal()) - s("y", dist.Normal(0.0, 2.0))) ** 2), {"x", "y"}),
    "normal, bent": (lambda s: jnp.tanh(s("x", dist.Normal())), set()),
    "vector": (lambda s: s("x", dist.MultivariateNormal(jnp.ones(2), jnp.eye(2))).sum(), {"x"}),
    "child of a normal": (lambda s: s("y", dist.Normal(s("x", dist.Normal()), 2.0)), {"x", "y"}),
    "its square as a mean": (lambda s: s("y", dist.Normal(s("x", dist.Normal()) ** 2, 2.0)), set()),
    "count, linear": (lambda s: 0.5 * s("x", dist.Poisson(3.0)) + s("y", dist.Normal()), {"x", "y"}),
    "count, squared": (lambda s: -0.1 * s("x", dist.Poisson(3.0)) ** 2.0, set()),
    "count of a normal": (lambda s: s("x", dist.Poisson(jnp.exp(s("y", dist.Normal())))), {"x"}),
    "times a later draw": (lambda s: s("x", dist.Normal()) * s("k", dist.Bernoulli(0.5)), set()),
    "beside a later draw": (lambda s: s("x", dist.Normal()) + s("k", dist.Bernoulli(0.5)), {"x"}),
    "product of counts": (lambda s: 0.01 * s("x", dist.Poisson(3.0)) * s("y", dist.Geometric(0.5)), set()),
    "gamma": (lambda s: 0.1 * s("x", dist.Gamma(3.0, 2.0).expand([2]).to_event(1)).sum(), {"x"}),
    "beta": (lambda s: s("x", dist.Beta(3.0, 2.0)), set()),
}


@pytest.mark.parametrize("name", CONJUGATE)
def test_sites_that_a_plain_tilt_holds(name: str) -> None:
    reward_of, conjugate = CONJUGATE[name]

    def policy() -> None:
        bayesrl.reward("r", reward_of(numpyro.sample))

    assert conjugate_sites(KEY, policy, inspect(KEY, policy), ()) == conjugate


def test_a_zero_beside_a_continuous_distribution() -> None:
    """Its tilt has the density of the prior at first, and slopes that are finite at zero; masses add up to 1."""
    fn = dist.HurdleGamma(0.3, 3.0, 2.0)
    (size,) = tilt_shape("x", fn, None)
    points = jnp.linspace(0.0, 15.0, 3001)

    def both() -> Any:
        plain, moved = (tilt_distribution(fn, c * jnp.ones(size), None).log_prob(points) for c in (0.0, 0.3))
        slopes = jax.grad(lambda theta: tilt_distribution(fn, theta, None).log_prob(points).sum())(jnp.full(size, 0.3))
        return plain, fn.log_prob(points), moved, slopes

    plain, prior, moved, slopes = (np.asarray(x, float) for x in closure_jit(both)())
    np.testing.assert_allclose(plain, prior, rtol=1e-5, atol=1e-4)
    assert np.isfinite(slopes).all()
    mass = np.exp(moved)
    assert mass[0] == pytest.approx(1 / (1 + np.exp(-(np.log(0.3 / 0.7) + 0.3))), rel=1e-5)
    assert np.trapezoid(np.r_[0.0, mass[1:]], np.asarray(points)) + mass[0] == pytest.approx(1.0, abs=1e-3)


def test_degrees_and_costs_of_a_program() -> None:
    values = {"x": jnp.zeros(3), "y": jnp.zeros(3)}
    cases: list[tuple[Any, int, int]] = [
        (lambda v: [v["x"] ** 2, v["x"] * v["y"] - v["y"]], 2, 2),
        (lambda v: [(v["x"] @ jnp.eye(3) - 2 * v["y"]).sum() ** 2 / 4], 2, 2),
        (lambda v: [v["x"] ** 2 * v["y"]], NOT_POLYNOMIAL, NOT_POLYNOMIAL),
        (lambda v: [jnp.tanh(v["x"]), dist.Normal(v["y"], 2.0).log_prob(1.0)], NOT_POLYNOMIAL, 2),
        (lambda v: [jnp.where(v["x"] > 0, v["y"], 0.0)], NOT_POLYNOMIAL, NOT_POLYNOMIAL),
        (lambda v: [jax.lax.scan(lambda c, u: (c + u, c * 2.0), 0.0, v["x"])[0], v["y"] ** 0], 1, 0),
        (lambda v: [jax.lax.scan(lambda c, u: (c * u, c), 1.0, v["x"])[0]], NOT_POLYNOMIAL, 0),
        (lambda v: [jnp.arange(3.0)[1] / v["x"]], NOT_POLYNOMIAL, 0),
    ]
    for function, x, y in cases:
        assert input_degrees(function, values) == {"x": x, "y": y}
    assert count_dependent_numbers(lambda v: (v["x"] * 2).sum(), values) == 4
    matrix = jnp.ones((50, 3))
    assert (
        count_dependent_numbers(lambda v: (matrix * 2) @ v["x"], values) == 150
    )  # what does not depend on the values is free
    called = count_dependent_numbers(lambda v: jax.pure_callback(np.sum, jnp.zeros(()), v["x"]), values)
    assert called is None
