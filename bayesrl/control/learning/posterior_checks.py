"""Whether what was learned can be trusted: decisions, predictions of the data, and NUTS beside the posterior."""

from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from bayesrl.arguments import Count, CountAboveOne, check_memory, checked, integer_range
from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.keys import split, split_keys
from bayesrl.control.learning.agents.bayesian_state import BayesianAgentState
from bayesrl.control.learning.replay_memory import Experience
from bayesrl.control.learning.result import LearnResult
from bayesrl.core.primitives import site_kind
from bayesrl.diagnostics.results import Check
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey, PRNGKeys

if TYPE_CHECKING:
    import xarray as xr

SETTLED, DESCRIBED = "first decision settled", "data as predicted"
_ROWS = 5000
_REPLICATES = 200
_SURE, _CHEAP, _NEAR, _ODD = 0.95, 0.02, 0.1, 0.01


@checked(ControlError)
def check_learning(key: PRNGKey, learned: LearnResult) -> list[Check]:
    """Ask of a run: is the decision in the first state settled, is play near the optimum, does the model fit the data?

    Args:
        key: consumed whole.
        learned: what `learn` gave.

    Returns:
        Checks; those about a posterior only for `BayesianAgent`.

    References:
        Gelman, Meng & Stern (1996), "Posterior predictive assessment of model fitness", for the p-values.
    """
    checks = []
    if isinstance(learned.agent_state, BayesianAgentState) and learned.num_episodes:
        checks += _decision(key, learned)
    if learned.num_episodes and not np.isnan(learned.history["regret"]).all():
        checks.append(_near_optimum(learned))
    if isinstance(learned.agent_state, BayesianAgentState) and learned.num_episodes:
        checks.append(_predictive(key, learned))
    return checks


def _decision(key: PRNGKey, learned: LearnResult) -> list[Check]:
    first = learned.bayesian_state().memory.arrays()["observation"][0]
    told = learned.decide(key, first)
    best = int(np.argmin(told.regret))
    sure, loss = float(told.p_optimal[best]), float(told.regret[best])
    scale = abs(learned.env.optimum or 0.0) or float(np.abs(np.asarray(learned.history["return"])).max()) or 1.0
    return [
        Check(
            SETTLED,
            sure,
            _SURE,
            "pass" if sure >= _SURE else "warn",
            f"P(action {learned.action_name(best)} is the best in the first state); where it is low, actions may be "
            "worth the same, or more episodes are needed.",
            "",
            least=True,
        ),
        Check(
            "what it may cost",
            loss / scale,
            _CHEAP,
            "pass" if loss / scale <= _CHEAP else "warn",
            "Expected loss of this decision, as a share of the optimum (or best return); more episodes lower it.",
            "",
        ),
    ]


def _near_optimum(learned: LearnResult) -> Check:
    last = max(learned.num_episodes // 10, 1)
    regret = learned.history["regret"][-last:]
    scale = abs(learned.env.optimum or 0.0) or 1.0
    value = float(np.mean(regret) / scale)
    error = float(np.std(regret, ddof=1) / last**0.5 / scale) if last > 1 else np.inf
    outcome: Any = "pass" if value <= _NEAR + 2 * min(error, 1.0) else "fail" if value > 0.5 else "warn"
    return Check(
        "near the optimum",
        value,
        _NEAR + (2 * min(error, 1.0) if outcome == "pass" and value > _NEAR else 0.0),
        outcome,
        f"Mean regret of the last {last:,} episodes, as a share of the optimum"
        + (f" (± {error:.2g})" if np.isfinite(error) else "")
        + "; where it is high, play more episodes, or explore by thompson() or k_learning().",
        "",
    )


def _predictive(key: PRNGKey, learned: LearnResult) -> Check:
    told = predictive_p_values(key, learned)
    worst = min(told, key=lambda name: min(told[name], 1 - told[name]))
    value = 2 * min(told[worst], 1 - told[worst])
    return Check(
        DESCRIBED,
        value,
        _ODD,
        "pass" if value >= _ODD else "warn",
        f"Least two-sided posterior predictive p-value, of the {worst}; where it is small, the model does not describe "
        "what was seen: change its likelihood.",
        "",
        least=True,
    )


@checked(ControlError)
def predictive_p_values(
    key: PRNGKey, learned: LearnResult, *, num_replications: Count = _REPLICATES
) -> dict[str, float]:
    """Give P(T(replicated data) > T(data)), ties counted half, for mean and standard deviation of each observed site.

    The actions that were taken are kept, what followed is drawn anew from the posterior.

    Args:
        key: consumed whole.
        learned: by a `BayesianAgent`.
        num_replications: data sets to draw.

    Returns:
        By statistic, such as `mean of reward`.

    Raises:
        ControlError: the agent has no posterior over what is unknown, or the number is below 1.
    """
    agent_state = learned.bayesian_state()
    first = max(agent_state.memory.num_rows - _ROWS, 0)
    rows = agent_state.rows(first, agent_state.memory.num_rows)
    draw_key, own_key = split_keys(key)
    sites, _ = agent_state.sample(draw_key, num_replications)

    def statistics(site: Any) -> Any:
        values, mask = jnp.asarray(site["value"], float), getattr(site["fn"], "_mask", True)
        counted = jnp.broadcast_to(jnp.asarray(True if mask is None else mask), values.shape)
        return jnp.stack([jnp.mean(values, where=counted), jnp.std(values, where=counted)])

    def told(program: Any, key: PRNGKey, rows: Experience) -> Any:
        args = (rows,) if agent_state.finite else (rows, jnp.zeros((1, *learned.env.shape), learned.env.dtype))
        with handlers.block(), handlers.trace() as trace:
            handlers.seed(program, rng_seed=key)(*args)
        return trace

    def one(key: PRNGKey, sites: Any, rows: Experience) -> dict[str, Any]:
        trace = told(_Redrawn(handlers.substitute(agent_state.model, data=sites)), key, rows)
        return {
            name: statistics(site)
            for name, site in trace.items()
            if site.get("infer", {}).get("redrawn") and site["type"] == "sample"
        }

    def replicate(keys: PRNGKeys, sites: Any, rows: Experience) -> tuple[dict[str, Any], dict[str, Any]]:
        drawn = jax.vmap(one, in_axes=(0, 0, None))(keys, sites, rows)
        own = jax.tree.map(lambda x: x[0], sites)
        trace = told(handlers.substitute(agent_state.model, data=own), keys[0], rows)
        return drawn, {name: statistics(trace[name]) for name in drawn}

    replicated, observed = closure_jit(replicate)(split(own_key, num_replications), sites, rows)
    found: dict[str, float] = {}
    for name, values in replicated.items():
        seen = np.asarray(observed[name])
        for i, what in enumerate(("mean", "spread")):
            drawn = np.asarray(values)[:, i]
            tie = np.isclose(drawn, seen[i], rtol=1e-5, atol=1e-7)
            found[f"{what} of {name}"] = float(((drawn > seen[i]) & ~tie).mean() + 0.5 * tie.mean())
    return found


class _Redrawn(handlers.uncondition):
    """Draws what the program observes, and marks it."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """Forget the data of an observed site."""
        if msg["type"] == "sample" and site_kind(msg) == "observed":
            msg["infer"] = {**msg.get("infer", {}), "redrawn": True}
            msg["is_observed"], msg["value"] = False, None


@checked(ControlError)
def nuts_posterior(
    key: PRNGKey,
    learned: LearnResult,
    *,
    num_warmup: Count = 300,
    num_samples: Annotated[int, integer_range(10)] = 500,
    num_chains: CountAboveOne = 2,
) -> "xr.DataTree":
    """Draw from the posterior of what is unknown by NUTS, to check the one that was learned with.

    Args:
        key: consumed whole.
        learned: by a `BayesianAgent`; the program of its model must have continuous sites alone.
        num_warmup: steps of each chain that are thrown away.
        num_samples: draws of each chain.
        num_chains: at least 2, lest R-hat say nothing.

    Returns:
        An ArviZ DataTree with `posterior`, `action_values` included where observations are finitely many:
        `arviz.summary` gives r_hat and ess.

    Raises:
        ControlError: the agent has no posterior over what is unknown, or a number is out of range.

    References:
        Hoffman & Gelman (2014), "The No-U-Turn sampler".
    """
    import xarray as xr
    from numpyro.infer import MCMC, NUTS

    agent_state = learned.bayesian_state()
    each = learned.env.num_actions
    what = f"nuts_posterior(num_samples={num_samples}, num_chains={num_chains})"
    check_memory(4.0 * num_samples * num_chains * each, what, "ask for fewer", ControlError)
    rows = agent_state.rows(0, max(agent_state.memory.num_rows, 1))
    args = (rows,) if agent_state.finite else (rows, np.zeros((1, *learned.env.shape), learned.env.dtype))
    sampler = MCMC(
        NUTS(agent_state.model),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    sampler.run(key, *args)
    drawn = {k: np.asarray(v) for k, v in sampler.get_samples(group_by_chain=True).items()}
    variables = {k: (["chain", "draw", *(f"{k}_dim_{i}" for i in range(v.ndim - 2))], v) for k, v in drawn.items()}
    coords = {"chain": np.arange(num_chains), "draw": np.arange(num_samples)}
    return xr.DataTree.from_dict({"posterior": xr.Dataset(variables, coords=coords)})
