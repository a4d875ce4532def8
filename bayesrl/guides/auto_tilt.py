"""The automatic guide: the policy itself, with a trainable tilt at each action site."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from bayesrl.arguments import Count, UnusedOption, checked
from bayesrl.compilation.jit import closure_jit, to_host
from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.core.structure import Structure
from bayesrl.core.support_edges import summarize_prior_draws
from bayesrl.core.trace import abstract_trace
from bayesrl.errors import GuideError
from bayesrl.guides.base import AutoGuide, PolicyGuide
from bayesrl.guides.networks import Summary, TiltNetwork
from bayesrl.guides.parameterization import Parameterization, Tilt, choose_parameterization
from bayesrl.guides.policy_analysis import PolicyAnalysis, analyze_policy, prior_moments
from bayesrl.guides.tilts.conjugacy import conjugate_sites
from bayesrl.guides.tilts.families import PriorRange, needs_prior_range, prior_range
from bayesrl.guides.tilts.handler import TiltHandler, TiltParams
from bayesrl.typing import Params, PRNGKey, Program

TABLE, NETWORK, SUMMARY = "$table", "$network", "$summary"
_STEP = 0.1
"""Parameters store networks at 1 / _STEP of their size, so that one Adam rate suits them and the tables."""
_NUM_DRAWS = 64


def _has_no_network(given: Mapping[str, Any]) -> bool:
    tables = {"table": (False,), "constant": (False, "auto")}
    return given["recurrent"] in tables.get(given["tilt"], ())


@checked(
    GuideError,
    UnusedOption(
        "hidden", _has_no_network, "tables have no width; use tilt='network', or recurrent=True for a summary"
    ),
)
@dataclass(frozen=True, kw_only=True)
class AutoTilt(AutoGuide):
    """The policy's own program with a tilt at each action site, starting at the prior.

    Every action site draws from its prior, tilted by θ: logits + θ (Bernoulli, Categorical, Binomial,
    Geometric), rate · exp(θ) (Poisson), both numbers of a negative binomial, exp(θ·(cos x, sin x))
    (VonMises), weights and parts of mixtures, gate and base of zero-inflated and hurdle counts,
    free log-probabilities on other finite supports, location and scale (Normal), an affine map of
    the prior's own draw in unconstrained space (all other continuous sites). If rewards and data can take
    a site's posterior out of its family, the tilt also bends continuous draws, coordinate by
    coordinate (`bayesrl.guides.tilts.sinh_arcsinh`), and reweights counts one by one in the range of the
    prior. Gamma, Beta and Dirichlet priors of small concentrations are split at their corners. θ is
    zero at first and depends on what the agent sees: earlier actions and observable nature in the same
    plate element, the time step, the plate element, the observable part of a scan's carry, and a
    recurrent summary where that is not enough.

    Args:
        tilt: `auto` puts θ in a table if its inputs are finite and the table fits, else in a small
            network beside a table of time step and plate element. `table` and `network` force one of
            them (`network` has no table of plate elements, so it carries over to other contexts).
            `constant` reads only time step and plate element.
        hidden: width of the networks.
        recurrent: whether scans get a summary of their past steps; `auto` adds one if something
            is scored after the scan or nature hides something.
        max_table: largest number of entries of one site's table.

    Raises:
        GuideError: an option is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl.core.structure import inspect
        >>> from bayesrl.guides import AutoTilt
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", 1.0 * arm)
        >>> structure = inspect(jax.random.key(0), bandit)
        >>> guide = AutoTilt().build(jax.random.key(1), bandit, structure, ())
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace()
        >>> list(trace)
        ['arm$table', 'arm']
    """

    tilt: Tilt = "auto"
    hidden: Count = 32
    recurrent: bool | Literal["auto"] = "auto"
    max_table: Count = 100_000

    def learning_rate_for(self, params: Params) -> float:
        """Suggest an Adam rate: a lower one if the fit also trains a policy's own parameters."""
        own = all(name.endswith(TABLE) or NETWORK in name or SUMMARY in name for name in params)
        return 0.1 if own else 0.01

    def build(self, key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...]) -> Program:
        """Build the guide; see `AutoGuide.build`."""
        survey_key, network_key = split_keys(key)
        plain = conjugate_sites(fold_in(key, 3), policy, structure, args)
        edges, lies = summarize_prior_draws(
            fold_in(key, 2), policy, structure, args, lambda name, fn: name not in plain and needs_prior_range(fn)
        )
        reaches = {
            name: prior_range(edges.get(name), lies.get(name), discrete=structure[name].discrete)._replace(
                rich=name not in plain
            )
            for name in structure.actions
        }
        facts, plan = self._plan(survey_key, policy, structure, args, reaches)
        if any(site.cut for site in plan.sites.values()):
            # A rich tilt has more outputs: where the table did not fit, try again with a plain one.
            plainer = {
                name: reach._replace(rich=reach.rich and not plan.sites[name].cut) for name, reach in reaches.items()
            }
            facts, plan = self._plan(survey_key, policy, structure, args, plainer)
        moments = prior_moments(survey_key, policy, structure, args, facts, _NUM_DRAWS) if plan.has_networks else {}
        make = closure_jit(partial(self._networks, plan=plan), name="networks")
        networks = make(network_key) if plan.has_networks else {}
        width = self.hidden

        def tilted(*args: Any) -> Any:
            return TiltHandler(policy, plan, _declare(plan, networks), moments, width)(*args)

        tilted.__wrapped__ = policy  # type: ignore[attr-defined]  # it takes the policy's arguments, and no others
        # Parameters of the policy itself may start at random, and then at other values than those of the prior.
        own = abstract_trace(key, policy, args).trace.params
        return PolicyGuide(tilted, within_prior=True, starts_at_prior=not own)

    def _plan(
        self, key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...], reaches: dict[str, PriorRange]
    ) -> tuple[PolicyAnalysis, Parameterization]:
        """Decide what each tilt reads, and how it is stored."""
        facts = analyze_policy(key, policy, structure, args, reaches)
        plan = choose_parameterization(
            structure, facts, tilt=self.tilt, hidden=self.hidden, recurrent=self.recurrent, max_table=self.max_table
        )
        return facts, replace(plan, reaches=reaches)

    def overdispersed_init(self, key: PRNGKey, params: Params) -> Params:
        """Add noise of about one to tables and network outputs; see `AutoGuide.overdispersed_init`."""
        result = {}
        for index, (name, value) in enumerate(sorted(params.items())):
            own_key = fold_in(key, index)
            if name.endswith(TABLE):
                result[name] = value + jax.random.normal(own_key, value.shape, value.dtype)
            elif name.endswith((f"{NETWORK}.skip.weight", f"{NETWORK}.out.weight")):
                # A sum over so many inputs then has noise of about one; parameters are stored divided by _STEP.
                scale = _STEP * jnp.sqrt(value.shape[-1])
                result[name] = value + jax.random.normal(own_key, value.shape, value.dtype) / scale
            else:
                result[name] = value
        return result

    def _networks(self, key: PRNGKey, plan: Parameterization) -> dict[str, Any]:
        """Make all networks, by parameter name."""
        made: dict[str, Any] = {}
        for index, (name, site) in enumerate(plan.sites.items()):
            if site.network:
                made[name + NETWORK] = TiltNetwork(
                    fold_in(key, 2 * index),
                    num_features=site.num_features,
                    num_outputs=site.num_outputs,
                    width=self.hidden,
                )
        for index, (name, summary) in enumerate(plan.summaries.items()):
            own_key = fold_in(key, 2 * index + 1)
            made[name] = Summary(own_key, num_features=summary.num_features, width=self.hidden)
        return made


def _declare(plan: Parameterization, networks: dict[str, Any]) -> TiltParams:
    """Declare the parameters before any scan, since one declared inside would be stacked over time."""
    tables = {
        name: numpyro.param(name + TABLE, np.zeros(site.table.shape, jnp.result_type(float)))
        for name, site in plan.sites.items()
        if site.table is not None
    }
    held = {name: _declare_network(name, network) for name, network in networks.items()}
    return TiltParams(
        tables,
        {name.removesuffix(NETWORK): value for name, value in held.items() if name.endswith(NETWORK)},
        {name: value for name, value in held.items() if name.endswith(SUMMARY)},
    )


def _declare_network(name: str, network: Any) -> Any:
    """Declare one parameter per array, because NumPyro's replay of a scan takes no pytrees."""
    arrays, rest = eqx.partition(network, eqx.is_inexact_array)
    leaves, structure = jax.tree_util.tree_flatten_with_path(arrays)
    stored = [numpyro.param(name + jax.tree_util.keystr(path), to_host(leaf) / _STEP) for path, leaf in leaves]
    return eqx.combine(jax.tree.unflatten(structure, [leaf * _STEP for leaf in stored]), rest)
