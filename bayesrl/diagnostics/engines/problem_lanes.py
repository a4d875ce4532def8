"""The one posterior that engines are compared on: its program and fit, at every temperature."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from bayesrl.compilation.random_keys import fold_in
from bayesrl.compilation.stopwatch import Stopwatch, stopwatch
from bayesrl.core.programs import Programs, over_all_data
from bayesrl.core.structure import Structure
from bayesrl.diagnostics.diagnosed_fit import frozen_fit, full_data_fit, out_of_reach, refuse_without_actions
from bayesrl.diagnostics.evidence.by_known_optimum import KnownOptimum
from bayesrl.diagnostics.evidence.mixture_sample import MixtureSample, draw_mixture_sample
from bayesrl.errors import BayesRLError, EngineError, PolicyError
from bayesrl.exact.tabulation import freeze_program
from bayesrl.objectives import ReverseKL
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.evaluations import Evaluations
from bayesrl.statistics.regularizer_names import distils
from bayesrl.svi.fitting import fit
from bayesrl.typing import Params, PRNGKey

_TRAINED = 0.75
"""Share of a fit's evaluations that train it; the rest evaluate it."""


class Lane(NamedTuple):
    """The posterior at one temperature.

    Attributes:
        beta: reward units per nat; None without rewards.
        programs: the frozen policy, with the guide if there is a fit.
        params: of the guide, unconstrained.
        one: the fit, with nothing left to select; None without one.
    """

    beta: float | None
    programs: Programs
    params: Params
    one: Posterior | None

    @property
    def alone(self) -> Programs:
        """The policy without a guide."""
        return replace(self.programs, guide=None, transforms={}, learned=False, episodes=None)


class TrainedHere(NamedTuple):
    """A fit that was made for the comparison: what it cost, or why there is none."""

    posterior: Posterior | None
    evaluations: Evaluations
    watch: Stopwatch
    reason: str = ""


@dataclass(frozen=True)
class EngineProblem:
    """What all engines are given.

    Attributes:
        lanes: one for each temperature.
        beta: temperatures, [*beta]; None without rewards.
        budget: evaluations of the program, for all temperatures together.
        is_given: whether the fit was given.
        trained: the fit that was made here, if one was.
        reach: why only a fit and a known optimum can say something; empty if others can.
        optimum: the known optimum, if there is one.
        reward_bound: greatest total reward of a context, if it was given.
        twist: a twist for particles, if one was given.
    """

    lanes: tuple[Lane, ...]
    beta: Any
    budget: int
    is_given: bool
    trained: TrainedHere | None
    reach: str
    optimum: KnownOptimum | None
    reward_bound: float | None
    twist: Any

    @property
    def structure(self) -> Structure:
        """Structure of the policy."""
        return self.lanes[0].programs.structure

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the temperatures."""
        return () if self.beta is None else np.shape(self.beta)

    @property
    def each(self) -> int:
        """Evaluations for each temperature, if they cannot share."""
        return max(self.budget // len(self.lanes), 2)

    @cached_property
    def is_shared(self) -> bool:
        """Whether all temperatures have the same policy, so that draws of the prior serve all."""
        return all(lane.programs.policy is self.lanes[0].programs.policy for lane in self.lanes)

    def refuse_nature(self) -> None:
        """Refuse to weigh draws of nature.

        Raises:
            EngineError: naming the site.
        """
        if nature := self.structure.names("environment"):
            raise EngineError(f"it would tilt environment site {nature[0]!r}, which is nature's")

    def refuse_unreachable(self) -> None:
        """Refuse a program of which only draws can be known.

        Raises:
            EngineError: with the reason.
        """
        if self.reach:
            raise EngineError(self.reach)

    def require_fit(self) -> None:
        """Refuse to go on without a fit.

        Raises:
            EngineError: saying why there is none.
        """
        if self.lanes[0].one is None:
            reason = self.trained.reason if self.trained is not None else "no fit was given or asked for"
            raise EngineError(reason)

    def samples(self, key: PRNGKey, *, of_fit: bool) -> list[MixtureSample]:
        """Draw for each temperature from the prior, or half from it and half from the fit."""
        if not of_fit and self.is_shared:
            return [draw_mixture_sample(key, self.lanes[0].alone, {}, self.budget)] * len(self.lanes)
        return [
            draw_mixture_sample(
                fold_in(key, i), lane.programs if of_fit else lane.alone, lane.params if of_fit else {}, self.each
            )
            for i, lane in enumerate(self.lanes)
        ]


def problem_of_fit(
    posterior: Posterior, new_args: tuple[Any, ...], budget: int, given: dict[str, Any]
) -> EngineProblem:
    """Compare engines on the posterior of a fit, which proposes for them."""
    if (regularizer := posterior.settings.get("regularizer", "kl")) != "kl":
        raise PolicyError(
            f"this posterior was fitted with regularizer={regularizer!r}, and engines draw from p* of KL; use "
            "bayesrl.evidence(...), which follows the regulariser"
        )
    if (n := posterior.settings.get("best_of_n")) is not None:
        raise PolicyError(f"engines draw from p*. {distils(n)} Use bayesrl.evidence(...), which is of that law")
    if posterior.mixture is not None:
        raise EngineError(
            "a mixture of restarts proposes nothing that particles or chains could use; use select(restart='best')"
        )
    whole = full_data_fit(posterior, *new_args)
    return EngineProblem(_lanes_of(whole), whole.beta, budget, True, None, out_of_reach(whole), **given)


def _lanes_of(whole: Posterior) -> tuple[Lane, ...]:
    betas = [None] if whole.beta is None else [float(b) for b in np.atleast_1d(whole.beta).reshape(-1)]
    lanes = []
    for beta in betas:
        one = whole if np.ndim(whole.beta if whole.beta is not None else 0) == 0 else whole.select(beta=beta)
        programs, params, _ = frozen_fit(one)
        lanes.append(Lane(beta, programs, params, one))
    return tuple(lanes)


def problem_of_policy(
    key: PRNGKey,
    policy: Any,
    args: tuple[Any, ...],
    beta: Any,
    budget: int,
    given: dict[str, Any],
    *,
    wanted: Sequence[str],
) -> EngineProblem:
    """Compare engines on the posterior of a policy, for which a fit is made if that is wanted."""
    program, reach = _frozen_whole(policy, args, beta)
    if program is not None:
        refuse_without_actions(program, "", "to compare engines on")
    trained = _train(key, policy, args, beta, budget) if _wants_fit(program, wanted) else None
    if trained is not None and trained.posterior is not None:
        lanes = _lanes_of(full_data_fit(trained.posterior))
        if program is not None:
            # One frozen policy for all engines, so that what they compile is shared.
            lanes = tuple(lane._replace(programs=replace(lane.programs, policy=program.policy)) for lane in lanes)
    elif program is not None:
        betas = [None] if beta is None else [float(b) for b in np.reshape(np.asarray(beta, float), -1)]
        lanes = tuple(Lane(b, program, {}, None) for b in betas)
    else:
        raise EngineError(f"no engine applies: {reach}" + ("" if trained is None else f"; {trained.reason}"))
    return EngineProblem(lanes, beta, budget, False, trained, reach, **given)


def _wants_fit(program: Programs | None, wanted: Sequence[str]) -> bool:
    """Whether an engine that is asked for and may apply needs a fit."""
    needed = {"fit"}
    if program is not None:
        structure = program.structure
        nature = structure.names("environment")
        smooth = not any(structure[name].discrete for name in structure.actions)
        needed |= {"hindsight"} if nature else {"importance_from_fit", *(["nuts"] if smooth else [])}
    return not needed.isdisjoint(wanted)


def _frozen_whole(policy: Any, args: tuple[Any, ...], beta: Any) -> tuple[Programs | None, str]:
    """Freeze a policy over all of its data, or say why no density of it is known."""
    try:
        return freeze_program(policy, args, beta), ""
    except EngineError:
        pass
    try:
        return freeze_program(over_all_data(policy), args, beta), ""
    except EngineError as error:
        return None, str(error).partition(";")[0]


def _train(key: PRNGKey, policy: Any, args: tuple[Any, ...], beta: Any, budget: int) -> TrainedHere:
    """Fit the policy with most of the budget."""
    num = max(math.prod(np.shape(beta) if beta is not None else ()), 1)
    particles = int(np.clip(budget // (32 * num), 2, ReverseKL().num_particles))
    steps = max(int(_TRAINED * budget) // (particles * num), 1)
    with stopwatch() as watch:
        try:
            objective = ReverseKL(num_particles=particles)
            made = fit(key, policy, *args, beta=beta, objective=objective, num_steps=steps, progress=False)
        except BayesRLError as error:
            return TrainedHere(None, Evaluations(), watch, f"the default fit fails: {str(error).partition(';')[0]}")
    return TrainedHere(made, Evaluations.of_both(steps * particles * num), watch)
