"""Posteriors from parameters that were trained elsewhere, and the draws that every posterior carries."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from bayesrl.compilation.callbacks import host_errors
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import fold_in, key_from_seed, split_keys
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs, declared_params
from bayesrl.core.unsupported import check_arguments, explain_errors
from bayesrl.errors import GuideError, PolicyError
from bayesrl.guides import AutoGuide
from bayesrl.posterior.policy_and_guide import bind_params, bind_programs, draw_and_check
from bayesrl.posterior.sampling import draw_fit, draw_prior
from bayesrl.statistics.definitions import is_conditioned
from bayesrl.typing import Params, PRNGKey, Program
from bayesrl.value_checks import format_value, is_function

DRAW_BUDGET = 4_000_000
LEAST_DRAWS = 32
"""The number of draws when they are large. It is the same for every purpose, so one compiled program serves all."""


def posterior_at(
    kind: Any,
    policy: Program,
    guide: Program | AutoGuide | None,
    params: Mapping[str, Any],
    args: tuple[Any, ...],
    beta: Any,
    *,
    unconstrained: bool,
) -> Any:
    """Make the posterior of one fit from its parameters; see `Posterior.at`.

    Raises:
        PolicyError, GuideError: the programs do not fit together, or the parameters do not fit them.
    """
    guide = _as_trained(guide)
    key = key_from_seed(0)  # for the checks, and for the draws that the posterior carries
    with trace_cache(), host_errors():
        if beta is not None and guide is not None:
            policy, params = _with_trained_policy(policy, guide, params, args, unconstrained=unconstrained)
        bound = bind_programs(key, policy, args, beta, guide)
        if bound.family is not None:
            raise GuideError(f"guide=None, and the policy draws {list(bound.programs.structure.actions)}; {_TRAINED}")
        own = bind_params("guide", bound.params, bound.programs.transforms, params, unconstrained=unconstrained)
        draw_and_check(key, bound.programs, own, by_hand=True)
        bare = kind(
            beta=None if beta is None else float(beta),
            params=jax.tree.map(lambda x: x[None], own),
            history={"loss": np.zeros((0, 1)), "step": np.zeros(0, int)},
            draws={},
            statistics={},
            prior_draws={},
            settings={"trained": "elsewhere"}
            | {f"{package}_version": version(package) for package in ("bayesrl", "numpyro", "jax", "optax")},
            programs=bound.programs,
        )
        return with_draws(fold_in(key, 6), bare, bound.params)


_TRAINED = "pass the guide that was trained: state.guide, posterior.programs.guide, or your own function"


def _as_trained(guide: Any) -> Program | None:
    """Return the guide, and refuse one that is no program, and so was not trained."""
    kind = guide if isinstance(guide, type) else type(guide)
    if issubclass(kind, AutoGuide):
        raise GuideError(f"guide={kind.__name__} is a family, which builds a guide anew for each key; {_TRAINED}")
    if guide is not None and (guide is kind or not is_function(guide)):
        raise GuideError(f"guide={format_value(guide)} is not a program; {_TRAINED}")
    trained: Program | None = guide
    return trained


def _with_trained_policy(
    policy: Program, guide: Program, params: Mapping[str, Any], args: tuple[Any, ...], *, unconstrained: bool
) -> tuple[Program, Mapping[str, Any]]:
    """Substitute the policy's own parameters into it; NumPyro's SVI trains these too.

    A name that the guide declares as well is the guide's: a guide that tilts a policy is a copy of it.

    Raises:
        GuideError: a parameter is none that the policy can take, or it is not given and its first value is random.
    """
    check_arguments(policy, args, "the policy", PolicyError)
    check_arguments(guide, args, "the guide", GuideError)
    with explain_errors("the policy", PolicyError):
        declared, transforms = declared_params(key_from_seed(0), policy, *args)
    if not declared:
        return policy, params
    with explain_errors("the guide", GuideError):
        of_guide = declared_params(key_from_seed(0), guide, *args)[0]
    given = {name: value for name, value in params.items() if name in declared and name not in of_guide}
    # A first value that differs between two keys is random.
    others = declared_params(key_from_seed(1), policy, *args)[0] if len(given) < len(declared) else {}
    for name, value in others.items():
        if name not in given and not jax.tree.all(jax.tree.map(np.array_equal, value, declared[name])):
            raise GuideError(
                f"parameter {name!r} of the policy has a random first value, so its prior is not known; pass "
                "state.policy, which holds that of the run, or another policy with its parameters substituted"
            )
    if not given:
        return policy, params
    own = {name: declared[name] for name in given}
    bound = bind_params("policy", own, transforms, given, unconstrained=unconstrained)
    values = {name: transforms[name](x) if name in transforms else x for name, x in bound.items()}
    return handlers.substitute(policy, data=jax.tree.map(jnp.asarray, values)), {
        name: x for name, x in params.items() if name not in given
    }


def judged_posterior(posterior: Any, policy: Program, args: tuple[Any, ...]) -> Any:
    """Put another policy with the same actions in the place of a posterior's own; see `Posterior.judged_by`.

    Raises:
        PolicyError, GuideError: the fit was not made of a policy with these actions.
    """
    guide = posterior._programs_for().guide
    if guide is None:
        raise PolicyError("the fit draws nothing, so there is nothing to judge; fit a policy with an action site")
    with_policy = getattr(guide, "with_policy", None)
    guide = guide if with_policy is None else with_policy(policy)
    key, shape = key_from_seed(0), posterior._fit_shape
    with trace_cache(), host_errors():
        bound = bind_programs(key, policy, args, posterior.beta, guide)
        own = bind_params("guide", bound.params, {}, posterior._lanes()[0], unconstrained=True)
        draw_and_check(key, bound.programs, own, by_hand=True)
        # J along the training was that of the other reward.
        history = {"loss": np.zeros((0, *shape)), "step": np.zeros(0, int)}
        bare = replace(posterior, programs=bound.programs, history=history, draws={}, statistics={}, prior_draws={})
        return with_draws(fold_in(key, 6), bare, bound.params)


def _starts_at_prior(programs: Programs) -> bool:
    """Whether the guide starts at the prior of this policy: a guide of another policy starts at that of the other."""
    guide, policy = programs.guide, programs.policy
    if guide is None or not getattr(guide, "starts_at_prior", False):
        return False
    return inspect.unwrap(guide, stop=lambda program: program is policy) is policy


def with_draws(key: PRNGKey, posterior: Any, start: Params | None = None) -> Any:
    """Fill in the draws that a posterior carries: up to 1,000 per fit, fewer if they are large.

    Args:
        key: consumed whole.
        posterior: of all fits.
        start: parameters of the guide before training. At these an automatic guide draws as the prior does, by a
            program that is compiled already.
    """
    programs = posterior.programs
    if programs is None:
        return posterior
    size = programs.structure.width
    # Episodes outside of a program are played one step at a time, so fewer are made.
    most = 1000 if programs.episodes is None else 20
    drawn_at_all = bool(programs.structure.names("action", "environment"))
    if not drawn_at_all:
        most = 50  # the only draws are mini-batches
    num = int(np.clip(DRAW_BUDGET // max(size * int(np.prod(posterior.batch_shape)), 1), min(LEAST_DRAWS, most), most))
    draw_key, prior_key = split_keys(key)
    draws, totals = posterior._draw(draw_key, num, ())
    prior = Draws.from_sites({})
    if drawn_at_all and start is not None and _starts_at_prior(programs):
        prior = draw_fit(prior_key, programs, start, num)[0]
    elif drawn_at_all:
        prior = draw_prior(prior_key, programs, posterior._lanes()[0], num)[0]
    beta = np.asarray(1.0 if posterior.beta is None else posterior.beta, np.float32)
    scale = beta.reshape(beta.shape + (1,) * (totals.reward.ndim - beta.ndim))
    statistics = {
        "log_prior": totals.log_prior,
        "total_reward": totals.reward,
        "log_q": totals.log_prior - totals.ratio,
        "log_weight": totals.log_weight(scale),
    }
    settings = dict(posterior.settings)
    if is_conditioned(programs.structure):
        statistics["log_likelihood"] = totals.log_likelihood
        marginal = posterior.log_marginal(fold_in(key, 1))
        if marginal is not None and np.isfinite(marginal.mean):
            settings |= {"log_marginal": float(marginal.mean), "log_marginal_se": float(marginal.se)}
    return replace(
        posterior,
        draws={**draws.sites, **draws.metrics},
        statistics=statistics,
        settings=settings,
        prior_draws={**prior.sites, **prior.metrics},
    )
