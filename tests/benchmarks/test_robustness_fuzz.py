"""A small part of the committed fuzz, the same each time: constructors and problems, every argument, every kind of value."""

import re
from typing import Any

import pytest

from bayesrl.errors import BayesRLError
from benchmarks.robustness_calls import (
    ABSTRACT,
    CALLS,
    GIVEN,
    RECORDS,
    defaults,
    names,
    parameters,
    public,
    targets,
)
from benchmarks.robustness_fuzz import _called, values
from benchmarks.robustness_things import Things
from benchmarks.robustness_verdicts import reason

CHEAP = (
    r"control\.(ActorCritic|CartPole|Pendulum|LinearValues|EnsembleValues|TabularMDP|Rollout|NetworkPolicy)"
    r"|control\.(LinearPolicy|TablePolicy|boltzmann|epsilon_greedy|prior_mixture|deep_sea|river_swim|grid_world|squashed_normal)"
    r"|bandits\.(\w+Arms|gittins_index|bayes_optimal_regret)|objectives\.\w+|guides\.\w+|lm\.LoRA"
    r"|rewards\.(contains|exact_match|number_match|regex_match|token_reward)|PreferenceData\.of_\w+"
    r"|bayesrl\.(ReuseDraws|svi_inference|Problem|full_data|tilt)"
)


def test_every_public_name_is_called_or_said_to_be_none_of_the_users() -> None:
    for name, _ in public():
        assert name in CALLS or name.partition(".")[2] in RECORDS + GIVEN + ABSTRACT, name


@pytest.mark.usefixtures("unchecked")
def test_each_call_is_refused_in_our_words_or_right_to_pass() -> None:
    things = Things()
    kinds, default = values(things), defaults()
    chosen = [name for name in names() if re.fullmatch(CHEAP, name)]
    assert len(chosen) >= 40
    count, faults = 0, []
    for name, called, valid in targets(things, chosen):
        for param in parameters(called):
            for value, given in kinds.items():
                count += 1
                told = _told(called, valid | {param: given})
                if told is None and reason(name, param, value, default.get(f"{name}.{param}")) is None:
                    faults.append(f"{name} {param}={value} was let through")
                if told is not None and not re.search(r"[;,:]", told):
                    faults.append(f"{name} {param}={value} told no remedy: {told}")
    assert count > 5000
    assert not faults, faults[:20]


def _told(called: Any, given: dict[str, Any]) -> str | None:
    """Give the words of the error of ours that a call ended in; anything else that is raised fails the test."""
    try:
        _called(called, given)
    except BayesRLError as error:
        return str(error)
    return None
