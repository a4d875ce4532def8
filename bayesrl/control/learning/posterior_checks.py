"""Checks of a learned posterior: its decisions, its predictions of the data, and NUTS to compare with."""

from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from bayesrl.arguments import Count, CountAboveOne, check_memory, checked, integer_range
from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import split, split_keys
from bayesrl.control.learning.agents.bayesian_state import BayesianAgentState
from bayesrl.control.learning.replay_memory import Experience
from bayesrl.control.learning.result import LearnResult, draws_dataset
from bayesrl.diagnostics.checks import Check
from bayesrl.display.formatting import last_tenth
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey

if TYPE_CHECKING:
    import xarray as xr

SETTLED, DESCRIBED = "first decision settled", "data as predicted"
_ROWS = 5000
_REPLICATES = 200
_SURE, _CHEAP, _NEAR, _ODD, _LARGEST_ERROR = 0.95, 0.02, 0.1, 0.01, 0.25


@checked(ControlError)
def check_learning(key: PRNGKey, result: LearnResult) -> list[Check]:
    """Check a run: is the first decision settled, is play near the optimum, does the model fit the data?

    Args:
        key: random key; do not use it again.
        result: the result of `learn`.

    Returns:
        The checks; those of a posterior only for `BayesianAgent`.

    Example:
        >>> import jax
        >>> from bayesrl import control
        >>> arms = control.bandits.GaussianArms(2)
        >>> agent = control.BayesianAgent(control.ArmsModel(arms))
        >>> result = control.learn(jax.random.key(0), arms, agent, num_episodes=20)
        >>> [check.name for check in control.check_learning(jax.random.key(1), result)]
        ['first decision settled', 'what it may cost', 'near the optimum', 'data as predicted']

    References:
        P-values: Gelman, Meng & Stern (1996), "Posterior predictive assessment of model fitness".
    """
    if not result.num_episodes:
        return []
    bayesian = isinstance(result.agent_state, BayesianAgentState)
    near = [] if np.isnan(result.history["regret"]).all() else [_near_optimum(result)]
    return [*_decision(key, result), *near, _predictive(key, result)] if bayesian else near


def _decision(key: PRNGKey, result: LearnResult) -> list[Check]:
    first = result.bayesian_state().memory.arrays()["observation"][0]
    decision = result.decide(key, first)
    best = int(np.argmin(decision.regret))
    sure, loss = float(decision.p_optimal[best]), float(decision.regret[best])
    scale = abs(result.env.optimum or 0.0) or float(np.abs(np.asarray(result.history["return"])).max()) or 1.0
    settled = (
        f"P(action {result.action_name(best)} is the best in the first state); where it is low, actions may be worth "
        "the same, or more episodes are needed."
    )
    cost = "Expected loss of this decision, as a share of the optimum (or best return); more episodes lower it."
    return [
        Check(SETTLED, sure, _SURE, "pass" if sure >= _SURE else "warn", settled, least=True),
        Check("what it may cost", loss / scale, _CHEAP, "pass" if loss / scale <= _CHEAP else "warn", cost),
    ]


def _near_optimum(result: LearnResult) -> Check:
    last, named = last_tenth(result.num_episodes, "episode")
    regret = result.history["regret"][-last:]
    scale = abs(result.env.optimum or 0.0) or 1.0
    value = float(np.mean(regret) / scale)
    error = float(np.std(regret, ddof=1) / last**0.5 / scale) if last > 1 else np.inf
    allowed = _NEAR + 2 * error
    outcome: Any = "pass" if value <= allowed else "fail" if value > 0.5 else "warn"
    if outcome == "pass" and value > _NEAR and error > _LARGEST_ERROR:
        outcome, allowed = "unknown", _NEAR  # so wide an interval holds the optimum whatever was learned
    shown = f" (± {error:.2g})" if np.isfinite(error) else ""
    explanation = (
        f"Mean regret of the {named}, as a share of the optimum{shown}; where it is high, play more episodes, or "
        "explore by thompson() or k_learning()."
    )
    return Check(
        "near the optimum", value, allowed if outcome == "pass" and value > _NEAR else _NEAR, outcome, explanation
    )


def _predictive(key: PRNGKey, result: LearnResult) -> Check:
    p_values = {name: 2 * min(p, 1 - p) for name, p in predictive_p_values(key, result).items()}
    worst = min(p_values, key=lambda name: p_values[name])
    explanation = (
        f"Least two-sided posterior predictive p-value, of the {worst}; where it is small, the model does not describe "
        "what was seen: change its likelihood."
    )
    outcome: Any = "pass" if p_values[worst] >= _ODD else "warn"
    return Check(DESCRIBED, p_values[worst], _ODD, outcome, explanation, least=True)


@checked(ControlError)
def predictive_p_values(
    key: PRNGKey, result: LearnResult, *, num_replications: Count = _REPLICATES
) -> dict[str, float]:
    """Compute P(T(replicated data) > T(data)) for the mean and standard deviation of each observed site.

    Replications keep the actions and draw their consequences anew from the posterior. Ties count half.

    Args:
        key: random key; do not use it again.
        result: the result of a `BayesianAgent`.
        num_replications: number of data sets to draw.

    Returns:
        P-values by statistic, such as `mean of reward`.

    Raises:
        ControlError: the agent has no posterior over the unknown, or the number is below 1.

    Example:
        >>> import jax
        >>> from bayesrl import control
        >>> arms = control.bandits.GaussianArms(2)
        >>> agent = control.BayesianAgent(control.ArmsModel(arms))
        >>> result = control.learn(jax.random.key(0), arms, agent, num_episodes=20)
        >>> sorted(control.predictive_p_values(jax.random.key(1), result))
        ['mean of reward', 'spread of reward']
    """
    agent_state = result.bayesian_state()
    last = agent_state.memory.num_rows
    rows = agent_state.rows(max(last - _ROWS, 0), last)
    draw_key, data_key = split_keys(key)
    theta, _ = agent_state.sample(draw_key, num_replications)

    def statistics(site: Any, value: Any) -> Any:
        values, mask = jnp.asarray(value, float), getattr(site["fn"], "_mask", True)
        counted = jnp.broadcast_to(jnp.asarray(True if mask is None else mask), values.shape)
        return jnp.stack([jnp.mean(values, where=counted), jnp.std(values, where=counted)])

    def replicate_once(key: PRNGKey, theta: Any, rows: Experience) -> dict[str, tuple[Any, Any]]:
        """Compute the statistics of the replicated and of the observed data, by site."""
        # It draws observed sites anew, and keeps what was observed in infer["obs"].
        model = handlers.uncondition(handlers.substitute(agent_state.model, data=theta))
        with handlers.block(), handlers.trace() as trace:
            handlers.seed(model, rng_seed=key)(rows, result.env.blank)
        return {
            name: (statistics(site, site["value"]), statistics(site, site["infer"]["obs"]))
            for name, site in trace.items()
            if "obs" in site.get("infer", {})
        }

    found: dict[str, float] = {}
    replicate = closure_jit(jax.vmap(replicate_once, in_axes=(0, 0, None)), name="replicate")
    for name, pair in replicate(split(data_key, num_replications), theta, rows).items():
        replicated, observed = (np.asarray(x) for x in pair)
        # Statistics of discrete data tie, and sums in another order differ by rounding.
        tie = np.isclose(replicated, observed, rtol=1e-5, atol=1e-7)
        share = ((replicated > observed) & ~tie).mean(0) + 0.5 * tie.mean(0)
        found |= {f"{what} of {name}": float(p) for what, p in zip(("mean", "spread"), share, strict=True)}
    return found


@checked(ControlError)
def nuts_posterior(
    key: PRNGKey,
    result: LearnResult,
    *,
    num_warmup: Count = 300,
    num_samples: Annotated[int, integer_range(10)] = 500,
    num_chains: CountAboveOne = 2,
) -> "xr.DataTree":
    """Draw from the posterior of the unknown by NUTS, to check the agent's own posterior.

    Args:
        key: random key; do not use it again.
        result: the result of a `BayesianAgent`; the program of its model must have only continuous sites.
        num_warmup: warm-up steps of each chain, which are discarded.
        num_samples: draws of each chain.
        num_chains: number of chains, at least 2, because R-hat compares chains.

    Returns:
        An ArviZ DataTree with `posterior`, including `action_values` if there are finitely many observations;
        `arviz.summary` computes r_hat and ess.

    Raises:
        ControlError: the agent has no posterior over the unknown, or a number is out of range.

    Example:
        >>> import jax
        >>> from bayesrl import control
        >>> arms = control.bandits.GaussianArms(2)
        >>> agent = control.BayesianAgent(control.ArmsModel(arms))
        >>> result = control.learn(jax.random.key(0), arms, agent, num_episodes=20)
        >>> sorted(control.nuts_posterior(jax.random.key(1), result, num_warmup=20, num_samples=20).posterior.data_vars)
        ['action_values', 'instance']

    References:
        Hoffman & Gelman (2014), "The No-U-Turn sampler".
    """
    import xarray as xr
    from numpyro.infer import MCMC, NUTS

    agent_state = result.bayesian_state()
    each = result.env.num_actions
    what = f"nuts_posterior(num_samples={num_samples}, num_chains={num_chains})"
    check_memory(4.0 * num_samples * num_chains * each, what, "ask for fewer", ControlError)
    # Before any step, one blank row stands in, so that no array is empty.
    rows = agent_state.rows(0, max(agent_state.memory.num_rows, 1))
    sampler = MCMC(
        NUTS(agent_state.model),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        # NumPyro's default wants a device for each chain.
        chain_method="vectorized",
        progress_bar=False,
    )
    sampler.run(key, rows, result.env.blank)
    draws = sampler.get_samples(group_by_chain=True)
    return xr.DataTree.from_dict({"posterior": draws_dataset(draws)})
