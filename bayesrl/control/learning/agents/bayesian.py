"""`BayesianAgent`: Bayesian RL as an agent that learns one episode at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Count, UnusedOption, checked
from bayesrl.control.learning.agents.base import Agent
from bayesrl.control.learning.agents.bayesian_state import BayesianAgentState
from bayesrl.control.learning.env_adapter import EnvAdapter
from bayesrl.control.learning.models.base import EnvironmentModel, ProgramModel
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey
from bayesrl.value_checks import is_function

type ModelOrProgram = Annotated[
    Any,
    Requirement(
        "a model of the unknown, such as TabularModel(...), or a NumPyro program of the experience",
        lambda model: is_function(model) and not isinstance(model, type),
        any_type=True,
    ),
]
"""A model of the unknown, or your own program in its place."""


def _fits_itself(given: Mapping[str, Any]) -> bool:
    model = given["model"]
    return isinstance(model, ProgramModel) or (isinstance(model, EnvironmentModel) and given["inference"] == "exact")


@checked(
    ControlError,
    UnusedOption("num_steps", _fits_itself, "the model has its own inference; inference='fit' makes steps for it"),
    UnusedOption(
        "update_every",
        lambda given: given["inference"] == "exact" and getattr(given["model"], "online", False),
        "the model takes in each step when it is made",
    ),
)
@dataclass(frozen=True, eq=False)
class BayesianAgent(Agent):
    """Bayesian RL: a posterior over the unknown, which drives exploration.

    Args:
        model: a model of the unknown, such as `TabularModel(...)` or `LinearValues(...)`, or a NumPyro program of
            the experience that records `numpyro.deterministic("action_values", …)`.
        inference: "exact", the model's own inference, or "fit", by SVI; your own programs are always fitted.
        num_samples: draws from the posterior for rules that use more than one; all but Thompson's do.
        num_steps: gradient steps of each update, if the posterior is fitted.
        update_every: episodes between updates of a posterior that is fitted or trained.

    Raises:
        ControlError: an option is out of range.

    Example:
        >>> from bayesrl import control
        >>> agent = control.BayesianAgent(control.TabularModel.of(control.river_swim()))
        >>> agent.default_exploration
        Thompson()
        >>> agent.describe()
        {'type': 'BayesianAgent', 'model': 'TabularModel', 'inference': 'exact', 'num_samples': 32}

    References:
        Ghavamzadeh, Mannor, Pineau & Tamar (2015), "Bayesian reinforcement learning: a survey".
    """

    model: ModelOrProgram
    inference: Literal["exact", "fit"] = "exact"
    num_samples: Count = 32
    num_steps: Count = 100
    update_every: Count = 1

    def describe(self) -> dict[str, Any]:
        """Describe the agent's identity; see `Agent.describe`."""
        name = getattr(self.model, "__qualname__", type(self.model).__name__)
        return {"type": "BayesianAgent", "model": name, "inference": self.inference, "num_samples": self.num_samples}

    def enter(self, key: PRNGKey, env: EnvAdapter, num_episodes: int) -> "BayesianAgentState":
        """Get ready for an environment; see `Agent.enter`."""
        model = self.model
        if self.inference == "fit" or not isinstance(model, EnvironmentModel):
            model = model if isinstance(model, ProgramModel) else ProgramModel(model, num_steps=self.num_steps)
        model.check(env)
        return BayesianAgentState(key, self, model, env, num_episodes)
