"""Turn fits on mini-batches into fits on all data: every diagnostic looks at those."""

from dataclasses import replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from numpyro import handlers

from bayesrl.argument_types import Requirement, checker
from bayesrl.compilation.random_keys import key_from_seed
from bayesrl.core.programs import Programs, declared_params
from bayesrl.errors import EngineError, PolicyError
from bayesrl.posterior.posterior import Posterior
from bayesrl.typing import Params, Program

type PolicyOrPosterior = Annotated[
    Program | Posterior,
    Requirement(
        f"a NumPyro program, or a Posterior, {Posterior.GIVEN_BY}",
        lambda value: isinstance(value, Posterior) or _is_program(value),
        any_type=True,
        error=PolicyError,
    ),
]
"""A program, or a fit of one."""


def _is_program(value: Any) -> bool:
    refuses = checker(Program)
    return refuses is None or refuses(value) is None


def full_data_fit(posterior: Posterior, *new_args: Any, what: str = "this posterior") -> Posterior:
    """Return the best restart of each β, or the selected mixture, on all data or on other arguments.

    The result keeps its draws only if the programs did not change.

    Raises:
        PolicyError: the posterior was loaded without its policy.
    """
    if posterior.programs is None:
        raise PolicyError(
            f"{what} was loaded without its policy, so it cannot be diagnosed or scored; "
            "load it with bayesrl.load(directory, policy, *args)"
        )
    selected = posterior.num_restarts == 1 or posterior.mixture is not None
    best = posterior if selected else posterior.select(restart="best")
    programs = posterior.programs.over_all_data(*new_args)
    return (
        best
        if programs is posterior.programs
        else replace(best, programs=programs, draws={}, statistics={}, prior_draws={})
    )


def refuse_without_actions(programs: Programs, of: str, task: str) -> None:
    """Refuse a policy without actions: it has no posterior."""
    if not programs.structure.actions:
        raise EngineError(
            f"the policy{of} draws nothing, so there is no posterior {task}; "
            "the likelihood of its data is posterior.estimate(key, n).objective"
        )


def out_of_reach(one: Posterior) -> str:
    """Say why only a known optimum could bracket a fit; empty if other methods can."""
    structure = one._programs_for().structure
    try:
        structure.check_complete("nothing bounds its optimum", EngineError)
        structure.check_whole_density()
    except EngineError as error:
        return str(error).partition(";")[0]
    return ""


def frozen_fit(one: Posterior) -> tuple[Programs, Params, bool]:
    """Return programs and parameters of one fit, with the policy held at its present values, and whether it trained."""
    programs, params = one.unbatched()
    refuse_without_actions(programs, "", "and nothing to bracket")
    # Parameters that the fit trained in the policy become constants, so that p* is fixed.
    policy, own = programs.policy, {}
    if programs.learned:
        declared = declared_params(key_from_seed(0), policy, *programs.args)[0]
        own = {name: value for name, value in programs.constrain(params).items() if name in declared}
        policy = handlers.substitute(policy, data=own) if own else policy
    frozen = replace(programs, policy=policy, learned=False, episodes=None)
    return frozen, jax.tree.map(jnp.asarray, params), bool(own)


def trains_policy(programs: Programs) -> bool:
    """Whether the fit trained parameters of the policy itself, so that there is no fixed prior."""
    return programs.learned and bool(declared_params(key_from_seed(0), programs.policy, *programs.args)[0])
