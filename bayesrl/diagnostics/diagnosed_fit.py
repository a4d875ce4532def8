"""Turn fits on mini-batches into fits on all data: every diagnostic looks at those."""

from dataclasses import replace
from typing import Any

from bayesrl.compilation.random_keys import key_from_seed
from bayesrl.core.programs import Programs, declared_params
from bayesrl.errors import EngineError, PolicyError
from bayesrl.posterior.posterior import Posterior


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


def trains_policy(programs: Programs) -> bool:
    """Whether the fit trained parameters of the policy itself, so that there is no fixed prior."""
    return programs.learned and bool(declared_params(key_from_seed(0), programs.policy, *programs.args)[0])
