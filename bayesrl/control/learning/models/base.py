"""Models of the environment: NumPyro programs over θ, and the inference of their posteriors."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro
import optax
from jax import Array
from numpyro import handlers

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Count, Positive, checked
from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import dummy_key
from bayesrl.control.learning.env_adapter import EnvAdapter
from bayesrl.control.learning.replay_memory import Experience
from bayesrl.display.formatting import pluralize
from bayesrl.errors import ControlError
from bayesrl.guides import AutoGuide
from bayesrl.objectives import ReverseKL
from bayesrl.svi.problem_setup import Setup, set_up
from bayesrl.svi.step import FitState, State, StepConfig, run_chunk, start
from bayesrl.typing import Numbers, PRNGKey, Program

ACTION_VALUES = "action_values"

type Sites = dict[str, Any]
"""Draws of θ by site, [draws, ...]."""


class EnvironmentModel(abc.ABC):
    """A model of an unknown environment: a NumPyro program over θ, with data, and a posterior of θ.

    The program draws θ, conditions on `Experience`, and exposes Q(s, a; θ), in reward units, to exploration by
    `numpyro.deterministic("action_values", …)`. Their shape is [states, actions] for finitely many observations, or
    [steps, states, actions] if the time matters; for other observations, the values at `seen`, [len(seen), actions].
    """

    online: ClassVar[bool] = False
    """Whether inference needs only `condition`, and never reads experience again."""
    plans: ClassVar[bool] = False
    """Whether values depend on the actions that each state allows, so that those must not change."""

    @abc.abstractmethod
    def __call__(self, experience: Experience, seen: Any = None) -> None:
        """Run the program."""

    def check(self, env: EnvAdapter) -> None:
        """Refuse an environment whose data the model does not describe, by a `ControlError` that says why."""
        return

    def check_experience(self, experience: Experience) -> None:
        """Refuse a new episode that is impossible under the model, by a `ControlError` that names the row."""
        return

    def init(self, key: PRNGKey, env: EnvAdapter) -> Any:
        """Make the state of inference, a pytree of arrays carried from update to update."""
        return self.empty(env.example())

    def empty(self, experience: Experience) -> Any:
        """Return the state of inference before any experience of this kind; by default, nothing."""
        return ()

    def condition(self, state: Any, rows: Experience) -> Any:
        """Condition on the rows of a new episode only; by default, do nothing."""
        return state

    def refit(self, key: PRNGKey, state: Any, experience: Experience) -> Any:
        """Refit to all experience; by default, do nothing."""
        return state

    @abc.abstractmethod
    def sample(self, key: PRNGKey, state: Any, experience: Experience, num_samples: int) -> Sites:
        """Draw θ from its posterior."""

    def values(self, sites: Sites, experience: Experience, seen: Any = None) -> Array:
        """Return the action values of one θ, as the program exposes them; refuse a program that does not."""
        return read_action_values(self, sites, experience, seen)

    def mean_values(self, state: Any, experience: Experience, seen: Any = None) -> Array | None:
        """Return the action values of the expected θ, or None if that has no meaning."""
        return None


def check_sizes(env: EnvAdapter, num_observations: int | None, num_actions: int) -> None:
    """Refuse an environment of another number of observations or actions than the model."""

    def sizes(observations: int | None, actions: int) -> str:
        seen = "vectors for observations" if observations is None else pluralize(observations, "state")
        return f"{seen} and {pluralize(actions, 'action')}"

    wanted, found = sizes(num_observations, num_actions), sizes(env.num_observations, env.num_actions)
    if wanted != found:
        raise ControlError(f"the model has {wanted}, and the environment has {found}; make both the same")


def read_action_values(program: Program, sites: Sites, experience: Experience, seen: Any) -> Array:
    """Run a program at a given θ, and read its `action_values`."""
    with handlers.block(), handlers.trace() as trace:
        handlers.seed(handlers.substitute(program, data=sites), rng_seed=dummy_key())(*_arguments(experience, seen))
    if ACTION_VALUES not in trace:
        name = getattr(program, "__qualname__", type(program).__name__)
        raise ControlError(
            f"the model {name} exposes no {ACTION_VALUES!r}, and exploration reads nothing else; add "
            f"numpyro.deterministic({ACTION_VALUES!r}, values) to it"
        )
    values: Array = trace[ACTION_VALUES]["value"]
    return values


@checked(ControlError)
@dataclass(eq=False)
class ProgramModel(EnvironmentModel):
    """Your own NumPyro program as a model of the unknown; SVI fits its posterior, as in `bayesrl.fit`.

    Each update starts from the parameters of the last one, so it takes few steps.

    Args:
        program: a program of (experience), or of (experience, seen) if observations are vectors.
        guide: a program of the same arguments, or a family; by default, `AutoTilt()`.
        num_steps: gradient steps for each update.
        num_particles: draws per step.
        learning_rate: Adam's learning rate; by default, that of the guide's family.
    """

    program: Program
    guide: Program | AutoGuide | None = None
    num_steps: Count = 100
    num_particles: Count = 16
    learning_rate: Positive | None = None

    @property
    def plans(self) -> bool:  # type: ignore[override]
        """Whether the program does; see `EnvironmentModel`."""
        return bool(getattr(self.program, "plans", False))

    def __post_init__(self) -> None:
        self._setup: Setup | None = None
        self._seen: Any = None

    def __call__(self, experience: Experience, seen: Any = None) -> None:
        """Run the program."""
        self.program(*_arguments(experience, seen))

    def check(self, env: EnvAdapter) -> None:
        """Get inference ready for the data of an environment; see `EnvironmentModel.check`."""
        if isinstance(self.program, EnvironmentModel):
            self.program.check(env)
        data = env.example()
        self._seen = env.blank
        args, objective = _arguments(data, self._seen), ReverseKL(num_particles=self.num_particles)
        setup = set_up(dummy_key(), self.program, args, None, self.guide, objective, 1)
        if ACTION_VALUES not in [site.name for site in setup.programs.structure.sites]:
            # Read the values now, so that a program without them fails before the first episode.
            jax.eval_shape(lambda data: read_action_values(self.program, {}, data, self._seen), data)
        self._setup = setup
        rate = setup.learning_rate if self.learning_rate is None else self.learning_rate
        self._config = StepConfig(setup.objective, optax.adam(rate), setup.programs)

    def check_experience(self, experience: Experience) -> None:
        """Refuse experience that the program refuses; see `EnvironmentModel.check_experience`."""
        if isinstance(self.program, EnvironmentModel):
            self.program.check_experience(experience)

    def init(self, key: PRNGKey, env: EnvAdapter) -> FitState:
        """Start at the prior."""
        train: FitState = closure_jit(partial(start, self._config), name="initial")(self._ready().params)
        return train

    def refit(self, key: PRNGKey, state: FitState, experience: Experience) -> FitState:
        """Take steps on the experience so far."""
        lanes = State(state, self._ready().betas, _arguments(experience, self._seen), self._config)
        # A fit of one lane: keys and parameters have a leading axis of size 1.
        return run_chunk(key[None], lanes, jnp.asarray(self.num_steps))[0]

    def sample(self, key: PRNGKey, state: FitState, experience: Experience, num_samples: int) -> Sites:
        """Draw from the fitted guide."""
        params = jax.tree.map(lambda x: x[0], state.params)
        programs = self._config.bind(_arguments(experience, self._seen))
        return dict(programs.draw(key, params, num_samples, share=False).sites)

    def _ready(self) -> Setup:
        if self._setup is None:
            raise ControlError("the model has seen no environment yet; pass it to learn(...) by BayesianAgent(model)")
        return self._setup


def _arguments(experience: Experience, seen: Any) -> tuple[Any, ...]:
    return (experience,) if seen is None else (experience, seen)


def observe_masked(name: str, fn: Any, value: Numbers, mask: Numbers) -> None:
    """Condition on the rows where the mask is True."""
    with numpyro.plate(f"{name}_rows", mask.shape[0]), handlers.mask(mask=mask):
        numpyro.sample(name, fn, obs=value)


type Conjugate = Annotated[
    Any,
    Requirement(
        "a model with an exact posterior, such as control.TabularModel(...)",
        lambda model: all(
            callable(getattr(model, name, None)) for name in ("empty", "condition", "sample", "replace_data")
        ),
        any_type=True,
    ),
]


@checked(ControlError)
def conjugate_inference(model: Conjugate) -> Callable[..., Any]:
    """Turn the exact posterior of a model into inference for `bayesrl.calibrate(infer=...)`."""

    def prepare(key: PRNGKey, program: Program, args: tuple[Any, ...], num_samples: int) -> Any:
        def draw(key: PRNGKey, args: tuple[Any, ...]) -> Sites:
            data, experience = args[0], args[1]
            experience = model.replace_data(experience, data)
            state = model.condition(model.empty(experience), experience)
            return model.sample(key, state, experience, num_samples)

        return draw

    return prepare
