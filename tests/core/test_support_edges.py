"""Draws at the edge of single precision: found, left where they are, and no part of any ratio."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayesrl
from bayesrl.compilation.jit import closure_jit
from bayesrl.core.censoring import LEAST, censored, is_censored
from bayesrl.core.structure import inspect
from bayesrl.core.support_edges import EdgeMasked, at_edge, edge_interval, edges_of
from bayesrl.guides.tilts.corner_mixtures import num_corner_parameters, split_at_corners
from bayesrl.guides.tilts.families import PriorRange, tilt_distribution, tilt_shape

LOGISTIC = dist.transforms.SigmoidTransform()
SATURATED: dict[str, Any] = {
    "Beta(.1, .1)": dist.Beta(0.1, 0.1),
    "Beta(.02, 3)": dist.Beta(0.02, 3.0),
    "Gamma(.01, 1)": dist.Gamma(0.01, 1.0),
    "logit-normal": dist.TransformedDistribution(dist.Normal(0.0, 10.0), [LOGISTIC]),
    "log-normal": dist.LogNormal(0.0, 80.0),
    "Kumaraswamy": dist.Kumaraswamy(0.05, 0.1),
}
PLAIN: dict[str, Any] = {
    "Beta(2, 3)": dist.Beta(2.0, 3.0),
    "Gamma(2, 1)": dist.Gamma(2.0, 1.0),
    "Normal": dist.Normal(0.0, 1e6),
    "Uniform": dist.Uniform(-3.0, 5.0),
    "LogNormal": dist.LogNormal(0.0, 2.0),
}


def test_they_are_found() -> None:
    """All sites of one program, so that one is compiled."""

    def program() -> None:
        for i, fn in enumerate((*SATURATED.values(), *PLAIN.values())):
            numpyro.sample(f"x{i}", fn)
        bayesrl.reward("r", 0.0)

    structure = inspect(jax.random.key(0), program)
    found = edges_of(jax.random.key(1), program, structure, ())
    assert set(found) == {f"x{i}" for i in range(len(SATURATED))}
    assert all(edge.num > 10 for edge in found.values())


@pytest.mark.parametrize("name", list(SATURATED))
def test_the_guide_is_a_density_beside_them(name: str) -> None:
    """E_π₀[q/π₀] = 1, and E_q[min(1, π₀/q)] = E_π₀[min(1, q/π₀)]: within 5 standard errors, 6e-7 of false alarms."""
    prior = SATURATED[name]
    ends = edge_interval(prior.support)
    assert ends is not None
    reach = PriorRange(ends, rich=False)
    width = tilt_shape("x", prior, None, reach)
    theta = jnp.asarray(np.resize([0.7, -0.3], width), jnp.float32)
    guide = tilt_distribution(prior, theta, None, reach)
    scored = censored(prior) if is_censored(guide) else EdgeMasked(prior, ends)
    num = 40_000

    def both() -> Any:
        ours, theirs = guide.sample(jax.random.key(0), (num,)), prior.sample(jax.random.key(1), (num,))
        slopes = jax.grad(lambda t: tilt_distribution(prior, t, None, reach).log_prob(theirs[:100]).sum())(theta)
        ratios = [scored.log_prob(x) - guide.log_prob(x) for x in (ours, theirs)]
        return *ratios, *(at_edge(prior, x, ends) for x in (ours, theirs)), slopes

    here, there, lost_here, lost, slopes = (np.asarray(x) for x in closure_jit(both)())
    assert np.isfinite(slopes).all()
    inverse = np.exp(-there.astype(float))
    assert np.isfinite(inverse).all()
    assert abs(inverse.mean() - 1) < 5 * inverse.std() / np.sqrt(num)
    ours, theirs = np.minimum(np.exp(here.astype(float)), 1), np.minimum(inverse, 1)
    assert abs(ours.mean() - theirs.mean()) < 5 * np.hypot(ours.std(), theirs.std()) / np.sqrt(num)
    if not is_censored(guide):  # what lies at the edge stays where it is
        assert (there[lost] == 0).all()
        assert abs(lost_here.mean() - lost.mean()) < 5 * np.sqrt(0.5 / num)


@pytest.mark.parametrize(
    "prior",
    [dist.Gamma(0.05, 2.0), dist.Beta(0.1, 0.3), dist.Dirichlet(jnp.array([0.1, 0.2, 0.3])), dist.Chi2(0.04)],
    ids=["Gamma", "Beta", "Dirichlet", "Chi2"],
)
def test_what_lies_at_an_edge_has_the_probability_of_all_of_it(prior: Any) -> None:
    """P(x₀ < ε) by the distribution function, at ε itself where single precision has it still, to 5 standard errors."""
    from scipy import stats

    num, whole = 20_000, censored(prior)
    assert whole is not None
    split_up = split_at_corners(whole, jnp.zeros(num_corner_parameters(prior)))
    drawn = closure_jit(lambda: whole.sample(jax.random.key(0), (num,)))()
    scores, same = closure_jit(lambda: (whole.log_prob(drawn), split_up.log_prob(drawn)))()
    np.testing.assert_allclose(scores, same, rtol=1e-4, atol=2e-4)
    first = np.asarray(drawn, float).reshape(num, -1)[:, 0]
    if isinstance(prior, dist.Dirichlet):
        truth = float(stats.beta(0.1, 0.5).cdf(LEAST))
    else:
        c = {"Gamma": (0.05, 0.5), "Chi2": (0.02, 2.0)}.get(type(prior).__name__)
        truth = float(stats.gamma(c[0], scale=c[1]).cdf(LEAST)) if c else float(stats.beta(0.1, 0.3).cdf(LEAST))
    share = (first < LEAST).mean()
    assert abs(share - truth) < 5 * np.sqrt(truth / num) + 1 / num


def test_a_guide_by_hand_is_refused() -> None:
    def program() -> None:
        x = numpyro.sample("share", dist.Beta(0.1, 0.1))
        bayesrl.reward("r", x)

    def guide() -> None:
        a = numpyro.param("a", jnp.array(0.2), constraint=dist.constraints.positive)
        numpyro.sample("share", dist.Beta(a, 0.1))

    with pytest.raises(bayesrl.errors.GuideError, match=r"\d+ of 1024 draws of the prior of site 'share'"):
        bayesrl.fit(jax.random.key(0), program, beta=1.0, guide=guide, num_steps=2, progress=False)


def test_log_z_and_j_of_a_prior_at_both_edges() -> None:
    """Beta(.1, .1), reward x: log Z = log M(.1, .2, 1), inside both intervals; J at most that, and what draws tell."""
    from scipy.special import hyp1f1

    def program() -> None:
        x = numpyro.sample("share", dist.Beta(0.1, 0.1))
        bayesrl.reward("r", x)

    posterior = bayesrl.fit(jax.random.key(0), program, beta=1.0, num_steps=150, progress=False)
    truth = float(np.log(hyp1f1(0.1, 0.2, 1.0)))
    found = bayesrl.evidence(jax.random.key(1), posterior)
    assert found.log_evidence is not None
    assert float(found.log_evidence.conservative_lower) <= truth <= float(found.log_evidence.conservative_upper)
    assert abs(float(found.log_evidence.mean) - truth) < 5 * float(found.log_evidence.se)
    told = posterior.estimate(jax.random.key(2), 4000).objective
    assert float(told.mean[0]) < truth
    assert abs(float(told.mean[0]) - float(found.objective.mean)) < 5 * np.hypot(float(told.se[0]), found.objective.se)
