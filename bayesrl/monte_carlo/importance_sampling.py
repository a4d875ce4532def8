"""Self-normalised importance sampling: log Z from weighted draws of the prior or of a fitted guide."""

from dataclasses import replace
from typing import Annotated, Any

import numpy as np

from bayesrl.argument_types import Requirement
from bayesrl.arguments import CountAboveOne, Untraced, checked
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import split_keys
from bayesrl.core.programs import Programs
from bayesrl.errors import EngineError
from bayesrl.exact.tabulation import freeze_program
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.monte_carlo.weighting import ScoredDraws, log_mean_weight, refuse_worthless, weigh, weighted_draws
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.sampling import draw_fit
from bayesrl.typing import Beta, Params, PRNGKey, Program


def _can_propose(value: Any) -> bool:
    return value is None or isinstance(value, Posterior) or (isinstance(value, tuple) and len(value) == 2)


type Proposal = Annotated[
    Posterior | tuple[Programs, Params] | None,
    Requirement(f"a Posterior, {Posterior.GIVEN_BY}, or None for the prior", _can_propose, any_type=True),
]
"""What to draw from instead of the prior: a posterior, or the result of its `unbatched`."""


@checked(EngineError, Untraced("call it outside: it compiles its own programs"))
@trace_cache()
def importance(
    key: PRNGKey,
    policy: Program,
    *args: Any,
    beta: Beta | None = None,
    proposal: Proposal = None,
    num_samples: CountAboveOne = 10_000,
) -> WeightedDraws:
    """Estimate the tilted posterior from weighted draws, per context.

    log Z ≈ log (1/N)·Σᵢ wᵢ with w = π₀·exp(R/β)·p(y|x)/q. Standard errors use the delta method.
    With environment sites the weights tilt nature too: `log_evidence` is that of the optimistic
    posterior, J* ≤ β·log Z, and `estimates` describe that posterior; `optimum` is then None.

    Args:
        key: consumed whole.
        policy: the program.
        *args: arguments of the program.
        beta: temperature, reward units per nat, [*beta]; required with rewards, refused without.
            All temperatures weight the same draws.
        proposal: what to draw from: a posterior with one temperature and restart, such as a fit of the same policy;
            None draws from the prior.
        num_samples: number of draws N, made and scored in batches of bounded memory.

    Returns:
        `WeightedDraws`, with the effective number of draws of each context.

    Raises:
        EngineError: fewer than 2 draws, a subsampled plate, or a context where no draw has a weight.
        PolicyError: beta does not fit the program, a reward is NaN or +inf, or the proposal holds several fits.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def count():
        ...     x = numpyro.sample("x", dist.Poisson(10.0))
        ...     bayesrl.reward("growth", x * jnp.log(1.1))
        >>> result = bayesrl.importance(jax.random.key(0), count, beta=1.0)  # Poisson(11), log Z = 1
        >>> bool(abs(result.log_evidence.mean - 1) < 5 * result.log_evidence.se)
        True

    References:
        Owen (2013), "Monte Carlo theory, methods and examples", section 9.2, equations 9.6 to 9.9.
    """
    program = freeze_program(policy, args, beta)
    programs, params = program, dict[str, Any]()
    if proposal is not None:
        other, params = proposal.unbatched() if isinstance(proposal, Posterior) else proposal
        programs = replace(program, guide=other.guide, transforms=other.transforms)
    draw_key, metric_key = split_keys(key)
    structure = program.structure
    structure.check_memory(num_samples, EngineError)
    draws = ScoredDraws.of(*draw_fit(draw_key, programs, params, num_samples), structure)
    refuse_worthless(structure, draws)
    betas = None if beta is None else np.asarray(beta, float)
    marginal = log_mean_weight(draws.log_base, num_samples) if structure.names("observed") else None
    lanes = [
        weigh(draws, draws.log_base if b is None else draws.log_base + draws.reward / b, b, marginal=marginal)
        for b in ([None] if betas is None else [float(b) for b in betas.reshape(-1)])
    ]
    return weighted_draws(metric_key, program, draws, lanes, betas, marginal)
