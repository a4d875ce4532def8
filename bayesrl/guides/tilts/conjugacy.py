"""Find the sites whose posterior a plain tilt represents exactly.

A normal draw that enters the other scores of a program at most squared has a normal posterior. If exp(cx) times a
family's density stays in the family, a draw x that enters the other scores linearly has a posterior in the family.
Neither needs a tilt that bends draws or reweights counts.
"""

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers

from bayesrl.core.primitives import unwrapped
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import Structure
from bayesrl.core.trace import TraceSite, abstract_trace, site_log_prob, trace_program
from bayesrl.jaxprs.polynomial_degrees import NOT_POLYNOMIAL, input_degrees
from bayesrl.typing import PRNGKey, Program

_NORMAL = (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)
_EXPONENTIAL = (
    dist.BinomialLogits,
    dist.BinomialProbs,
    dist.Exponential,
    dist.Gamma,
    dist.GammaPoisson,
    dist.GeometricLogits,
    dist.GeometricProbs,
    dist.Poisson,
)
"""Families in which exp(c·x) times a density is, up to a factor, another density that the plain tilt reaches."""


def conjugate_sites(key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...]) -> set[str]:
    """Return the action sites whose posterior a plain tilt represents; `key` is consumed whole."""
    seen = abstract_trace(key, policy, args).trace.sites
    cores = {name: unwrapped(seen[name].fn) for name in structure.actions}
    normal = {name for name, core in cores.items() if isinstance(core, _NORMAL)}
    exponential = {name for name, core in cores.items() if isinstance(core, _EXPONENTIAL)}
    if not normal and not exponential:
        return set()
    held = {name: jnp.zeros(jnp.shape(seen[name].value), jnp.result_type(seen[name].value)) for name in cores}

    def scores(values: dict[str, Array]) -> list[Any]:
        sites = trace_program(FoldedKeys(handlers.substitute(policy, data=values), key), *args).sites
        return [_rest(site, held[name] if name in exponential else None) for name, site in sites.items()]

    # A product of a normal draw x with a draw k of another family must not count as low degree: the posterior of x sums
    # over k, and the sum of exp(x·k) over k is not an exponential of x. So other families start at the highest degree.
    starts = {name: 1 if name in normal else NOT_POLYNOMIAL - 1 for name in cores}
    squared = input_degrees(scores, held, starts) if normal else {}
    linear = input_degrees(scores, held) if exponential else {}
    return {name for name in normal if squared[name] < NOT_POLYNOMIAL} | {
        name for name in exponential if linear[name] <= 1
    }


def _rest(site: TraceSite, held: Array | None) -> Any:
    """Score a site; if `held` is given, at that fixed value, so that only the parameters depend on draws."""
    if site.kind == "metric":
        return 0.0
    return site_log_prob(site if held is None else site._replace(value=held, intermediates=None))
