"""`TabularModel`: unknown transitions and rewards of finitely many states, with Dirichlet and Normal posteriors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax

from bayesrl.arguments import (
    AnyNumbersOrNone,
    Count,
    FiniteNumbers,
    MemoryNeed,
    Positive,
    PositiveNumbers,
    UnitInterval,
    checked,
)
from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import split_keys
from bayesrl.control.environments.tabular import TabularMDP
from bayesrl.control.exploration.beliefs import sample_dirichlet
from bayesrl.control.learning.env_adapter import EnvAdapter
from bayesrl.control.learning.models.base import ACTION_VALUES, EnvironmentModel, Sites, check_sizes, observe_masked
from bayesrl.control.learning.replay_memory import Experience
from bayesrl.display.formatting import pluralize
from bayesrl.errors import ControlError
from bayesrl.typing import Numbers, PRNGKey

_TEMPERATURES = 12
_NEVER = 1e-3
"""Concentration of outcomes that only pad a list."""


class Counts(NamedTuple):
    """The sufficient statistics of experience.

    Attributes:
        outcomes: count of each outcome, [states, actions, K].
        earned: the sum of rewards, [states, actions], reward units.
    """

    outcomes: Numbers
    earned: Numbers


class Cumulants(NamedTuple):
    """The worth of exploration, by soft backups.

    Attributes:
        values: K(t, s, a), reward units, [horizon, states, actions].
        temperature: τ, reward units per nat.
        bound: τ·log Σ_a exp(K(0, s, a)/τ), averaged over the first state: an upper bound on the expected optimum.
    """

    values: Array
    temperature: Array
    bound: Array


def _num_bytes(given: Mapping[str, Any]) -> float:
    states, actions = given["num_states"], given["num_actions"]
    outcomes = states + 1 if given["successors"] is None else 1
    return 8.0 * states * actions * outcomes + 4.0 * given["horizon"] * states


@checked(
    ControlError,
    MemoryNeed(_num_bytes, ("num_states", "num_actions", "horizon"), "pass successors=, or make it smaller"),
)
@dataclass(frozen=True, eq=False, kw_only=True)
class TabularModel(EnvironmentModel):
    """Unknown dynamics and rewards of finitely many states: P(· | s, a) ~ Dirichlet, r(s, a) ~ Normal.

    Each outcome is one of the states, or the end of the episode, numbered `num_states`, after which nothing is
    earned; `successors` says which outcomes are possible. Rewards are observed as Normal(r(s, a), noise).
    The posterior is conjugate: Dirichlet(concentration + counts), and Normal with precision 1/scale² + n/noise².

    Action values are those of the best policy under θ, by backward recursion over `horizon` steps:
    Q_t(s, a) = r(s, a) + γ·Σ_s′ P(s′ | s, a)·max_a′ Q_{t+1}(s′, a′), over the actions that s′ is known to allow.

    Args:
        num_states: number of states.
        num_actions: number of actions.
        horizon: steps of an episode.
        successors: the possible outcomes, [states, actions, K]; by default, all states and the end.
        concentration: concentration of the Dirichlet for each outcome, a number or [states, actions, K].
        reward_mean: mean of the prior of r(s, a), reward units, a number or [states, actions].
        reward_scale: standard deviation of that prior, reward units.
        noise: standard deviation of a reward around r(s, a), reward units.
        paid_at_end: whether it is known that only the step that ends an episode pays; r(s, a) is then its reward.
        discount: γ.
        start: distribution of the first state, [states], from which the model knows the states possible at each time;
            by default they are unknown, and the `bound` of K-learning is that of state 0.

    Raises:
        ControlError: a number is out of range, or shapes do not fit together.

    Example:
        >>> from bayesrl.control import TabularModel
        >>> TabularModel(num_states=6, num_actions=2, horizon=20).successors.shape
        (6, 2, 7)

    References:
        Priors: Dearden, Friedman & Andre (1999), "Model based Bayesian exploration". Posterior sampling: Osband, Russo
        & Van Roy (2013). Cumulants: O'Donoghue (2021), section 3.
    """

    online: ClassVar[bool] = True
    plans: ClassVar[bool] = True

    num_states: Count
    num_actions: Count
    horizon: Count
    successors: AnyNumbersOrNone = None
    concentration: PositiveNumbers = 1.0
    reward_mean: FiniteNumbers = 0.0
    reward_scale: Positive = 1.0
    noise: Positive = 1.0
    paid_at_end: bool = False
    discount: UnitInterval = 1.0
    start: AnyNumbersOrNone = None
    _layers: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = (self.num_states, self.num_actions)
        every = np.broadcast_to(np.arange(self.num_states + 1), (*pairs, self.num_states + 1))
        successors = every if self.successors is None else np.asarray(self.successors)
        if successors.shape[:2] != pairs or successors.ndim != 3:
            raise ControlError(f"successors has shape {successors.shape}; use [{pairs[0]}, {pairs[1]}, outcomes]")
        if successors.min() < 0 or successors.max() > self.num_states:
            odd = successors.min() if successors.min() < 0 else successors.max()
            raise ControlError(
                f"successors names state {odd}; use 0 to {self.num_states - 1}, and {self.num_states} for the end of "
                "the episode"
            )
        start = np.eye(1, self.num_states)[0] if self.start is None else np.asarray(self.start, float)
        if start.shape != (self.num_states,) or not (start >= 0).all() or abs(start.sum() - 1) > 1e-4:
            states = pluralize(self.num_states, "state")
            raise ControlError(f"start={self.start!r} is not a distribution over {states}; make it sum to 1")
        # Without `start`, episodes may start anywhere.
        here = np.full(self.num_states, True) if self.start is None else start > 0
        filled = {"successors": successors.astype(np.int32), "start": start}
        for name, shape in (("concentration", successors.shape), ("reward_mean", pairs)):
            value = np.asarray(getattr(self, name), float)
            try:
                filled[name] = np.broadcast_to(value, shape)
            except ValueError as error:
                raise ControlError(f"{name} has shape {value.shape}; use a number, or {list(shape)}") from error
        vars(self).update(filled)
        vars(self)["_layers"] = self._found_layers(here)

    @classmethod
    def of(cls, mdp: TabularMDP, *, ends_known: bool = True, **options: Any) -> "TabularModel":
        """Make a model that knows the possible successors of each state, horizon, discount and start, and no more.

        Any action of a state may lead wherever any other does; the model has to learn which action does what.

        Args:
            mdp: the process; it needs a horizon, or pass one.
            ends_known: whether the model knows which states end the episode; else any action may end it.
            **options: other arguments of the class.
        """
        horizon = options.pop("horizon", mdp.horizon)
        if horizon is None:
            raise ControlError(f"{mdp.name or 'the process'} has no horizon; pass horizon=")
        ends = np.where(mdp.terminal[mdp.successors] & ends_known, mdp.num_states, mdp.successors)
        # Outcomes of probability 0 give way to the first one, and `_shared` drops repetitions.
        ends = np.where(mdp.probabilities > 0, ends, ends[..., :1])
        if not ends_known:
            ends = np.concatenate([ends, np.full((*ends.shape[:2], 1), mdp.num_states)], -1)
        options.setdefault("discount", mdp.discount)
        options.setdefault("start", mdp.start)
        successors, again = _shared(ends)
        if np.ndim(options.get("concentration", 1.0)) == 0:
            options["concentration"] = np.where(again, _NEVER, options.get("concentration", 1.0))
        return cls(
            num_states=mdp.num_states, num_actions=mdp.num_actions, horizon=horizon, successors=successors, **options
        )

    def __call__(self, experience: Experience, seen: Any = None) -> None:
        """Draw `transitions` [states, actions, K] and `rewards` [states, actions], and observe every step."""
        concentration = jnp.asarray(self.concentration, float)
        transitions = numpyro.sample("transitions", dist.Dirichlet(concentration).to_event(2))
        prior = dist.Normal(jnp.asarray(self.reward_mean, float), self.reward_scale)
        rewards = numpyro.sample("rewards", prior.to_event(2))
        at = (experience.observation, experience.action)
        observe_masked("outcome", dist.Categorical(transitions[at]), self._outcome(experience), experience.mask)
        paid = experience.mask & (experience.terminated | (not self.paid_at_end))
        observe_masked("reward", dist.Normal(rewards[at], self.noise), experience.reward, paid)
        numpyro.deterministic(ACTION_VALUES, self.values({"transitions": transitions, "rewards": rewards}, experience))

    def check(self, env: EnvAdapter) -> None:
        """Refuse another environment; see `EnvironmentModel.check`."""
        check_sizes(env, self.num_states, self.num_actions)

    def empty(self, experience: Experience | None = None) -> Counts:
        """Return zeros; see `EnvironmentModel.empty`."""
        return Counts(np.zeros(self.successors.shape, np.float32), np.zeros(self.successors.shape[:2], np.float32))

    def condition(self, state: Counts, rows: Experience) -> Counts:
        """Count; see `EnvironmentModel.condition`."""
        at, mask = (rows.observation, rows.action), rows.mask.astype(float)
        # Blank rows add 0 to the counts of state 0, action 0.
        outcomes = jnp.asarray(state.outcomes).at[(*at, self._outcome(rows))].add(mask)
        paid = mask * (rows.terminated | (not self.paid_at_end))
        return Counts(outcomes, jnp.asarray(state.earned).at[at].add(paid * rows.reward))

    def sample(self, key: PRNGKey, state: Counts, experience: Experience, num_samples: int) -> Sites:
        """Draw θ from the exact posterior; see `EnvironmentModel.sample`."""
        concentration, mean, scale = self.posterior(state)
        first, second = split_keys(key)
        transitions = sample_dirichlet(first, jnp.broadcast_to(concentration, (num_samples, *concentration.shape)))
        noise = jax.random.normal(second, (num_samples, *mean.shape))
        return {"transitions": transitions, "rewards": mean + scale * noise}

    def posterior(self, counts: Counts) -> tuple[Array, Array, Array]:
        """Compute the Dirichlet's concentration [states, actions, K], and mean and scale of r [states, actions]."""
        paid = jnp.where(jnp.asarray(self.successors) == self.num_states, 1.0, 0.0 if self.paid_at_end else 1.0)
        precision = 1 / self.reward_scale**2 + (paid * counts.outcomes).sum(-1) / self.noise**2
        mean = (jnp.asarray(self.reward_mean) / self.reward_scale**2 + counts.earned / self.noise**2) / precision
        return jnp.asarray(self.concentration, float) + counts.outcomes, mean, precision**-0.5

    def values(self, sites: Sites, experience: Experience, seen: Any = None) -> Array:
        """Compute Q_t(s, a) of the best policy under θ, [horizon, states, actions]; 0 if s is impossible at t."""
        transitions, rewards = sites["transitions"], sites["rewards"]

        def value(later: Array, at: Array) -> tuple[Array, Array]:
            now, following = self._ahead(later, at, rewards[at])
            q = now + (transitions[at] * following).sum(-1)
            return q, _allowed(experience.allowed, at, q).max(-1)

        return self._backwards(value)[0]

    def _ahead(self, later: Array, at: Array, rewards: Array) -> tuple[Array, Array]:
        """Split a step's worth into a part for any outcome [..., actions] and one for each [..., actions, K]."""
        reached = jnp.asarray(self.successors)[at]
        following = self.discount * later[reached]
        if not self.paid_at_end:
            return rewards, following
        return jnp.zeros_like(rewards), jnp.where(reached == self.num_states, rewards[..., None], following)

    def _backwards(self, value: Callable[[Array, Array], tuple[Array, Array]]) -> tuple[Array, Array]:
        """Recur backwards over the states possible at each time.

        `value` maps the next step's values, [states + 1], and some states to (Q, V) in these. The result is Q,
        [horizon, states, actions], and V at the first step, [states].
        """

        def back(later: Array, at: Array) -> tuple[Array, Array]:
            q, v = value(later, at)
            # The end, last in `later`, stays worth 0; repeated states get equal values, in any order.
            return jnp.zeros_like(later).at[at].set(v), q

        layers = jnp.asarray(self._layers)
        first, found = lax.scan(back, jnp.zeros(self.num_states + 1), layers, reverse=True)
        if layers.shape[1] == self.num_states:
            return found, first[:-1]
        blank = jnp.zeros((self.horizon, self.num_states, self.num_actions))
        return blank.at[jnp.arange(self.horizon)[:, None], layers].set(found), first[:-1]

    def mean_values(self, state: Counts, experience: Experience, seen: Any = None) -> Array:
        """Compute the action values of the expected transitions and rewards, [horizon, states, actions]."""
        concentration, mean, _ = self.posterior(state)
        expected = concentration / concentration.sum(-1, keepdims=True)
        return self.values({"transitions": expected, "rewards": mean}, experience)

    def cumulants(self, counts: Counts, allowed: Numbers | None = None) -> Cumulants:
        """Compute the worth of exploration: K(t, s, a) by soft backups, at the temperature with the least bound.

            K_t(s, a) = E[r] + Var[r]/2τ + C_t(s, a),   V_t(s) = τ·log Σ_a exp(K_t(s, a)/τ),

        where C stands for τ·log E exp(γ·P·V_{t+1}/τ) under the Dirichlet posterior. It is the lesser of two numbers:
        that of a Normal with the same mean and variance, γ·E[P]·V + γ²·Var[P·V]/2τ; and Jensen's bound
        τ·log Σ E[P]·exp(γ·V/τ), which holds even with little data. Playing softmax(K_t/τ) is K-learning.

        Args:
            counts: the counts of the experience.
            allowed: which actions each state allows, [states, actions]; by default, all. V sums over these.
        """
        concentration, mean, scale = self.posterior(counts)
        total = concentration.sum(-1)
        expected = concentration / total[..., None]

        def solve(tau: Array) -> tuple[Array, Array]:
            def value(later: Array, at: Array) -> tuple[Array, Array]:
                now, following = self._ahead(later, at, mean[at] + scale[at] ** 2 / (2 * tau))
                ahead = (expected[at] * following).sum(-1)
                # Under a Dirichlet of total α, Var[P·V] is the variance of V under E[P], over α + 1.
                spread = (expected[at] * (following - ahead[..., None]) ** 2).sum(-1) / (total[at] + 1)
                bound = tau * jax.nn.logsumexp(following / tau, axis=-1, b=expected[at])
                k = now + jnp.minimum(ahead + spread / (2 * tau), bound)
                return k, tau * jax.nn.logsumexp(_allowed(allowed, at, k) / tau, axis=-1)

            values, first = self._backwards(value)
            return jnp.asarray(self.start, float) @ first, values

        def least(taus: Array) -> Array:
            bounds = jax.vmap(lambda tau: solve(tau)[0])(taus)
            # argmin would choose nan, so a bound that overflows counts as infinite.
            return taus[jnp.argmin(jnp.nan_to_num(bounds, nan=jnp.inf))]

        # The bound is convex in τ, so a narrow search around the best of a wide one suffices.
        coarse = least((scale.max() * self.horizon**0.5 + 1e-6) * jnp.geomspace(1e-3, 3.0, _TEMPERATURES))
        tau = least(coarse * jnp.geomspace(0.5, 2.0, _TEMPERATURES))
        bound, values = solve(tau)
        return Cumulants(values, tau, bound)

    def expected(self, counts: Counts) -> TabularMDP:
        """Return the expected process as a `TabularMDP`, with one more state for the end, for exact planning."""
        concentration, mean, _ = (np.asarray(x, float) for x in closure_jit(self.posterior)(counts))
        probabilities = concentration / concentration.sum(-1, keepdims=True)
        outcomes = self.successors.shape[-1]
        paid = (self.successors == self.num_states) | (not self.paid_at_end)
        end = ((0, 1), (0, 0), (0, 0))
        return TabularMDP(
            successors=np.pad(self.successors, end, constant_values=self.num_states),
            probabilities=np.pad(probabilities, end, constant_values=1 / outcomes),
            rewards=np.pad(np.where(paid, mean[..., None], 0.0), end),
            start=np.append(self.start, 0.0),
            terminal=np.arange(self.num_states + 1) == self.num_states,
            discount=self.discount,
            horizon=self.horizon,
        )

    def _found_layers(self, here: np.ndarray) -> np.ndarray:
        """List the states possible at each time, [horizon, width]; shorter lists are padded with repetitions."""
        every = np.arange(self.num_states)
        found = []
        for _ in range(self.horizon):
            found.append(np.flatnonzero(here))
            if len(found[-1]) == self.num_states:
                break
            there = np.zeros(self.num_states + 1, bool)
            there[self.successors[here]] = True
            # If every episode must be over by now, a list still needs states: it keeps the last ones.
            here = there[:-1] if there[:-1].any() else here
        width = max(map(len, found))
        # Lists pay only if they leave out most states, at all times.
        if 2 * width > self.num_states or len(found) < self.horizon:
            return np.broadcast_to(every, (self.horizon, self.num_states)).astype(np.int32)
        return np.stack([np.resize(row, width) for row in found]).astype(np.int32)

    def replace_data(self, experience: Experience, data: dict[str, Array]) -> Experience:
        """Replace outcomes and rewards by those that `bayesrl.calibrate` simulates."""
        at = (experience.observation, experience.action, data["outcome"])
        reached = jnp.asarray(self.successors)[at]
        return experience._replace(
            reward=data["reward"], next_observation=reached, terminated=reached == self.num_states
        )

    def _outcome(self, experience: Experience) -> Array:
        """Find the index of the outcome of each row."""
        # Padding repeats outcomes; argmax finds the first, which is not padding.
        return self._matches(experience, jnp).argmax(-1)

    def _matches(self, experience: Experience, xp: Any) -> Any:
        """Compare each row's outcome with the possible ones, [rows, K], by `jax.numpy` or NumPy."""
        reached = xp.where(experience.terminated, self.num_states, experience.next_observation)
        return xp.asarray(self.successors)[experience.observation, experience.action] == reached[:, None]

    def check_experience(self, experience: Experience) -> None:
        """Refuse outcomes that are not among the successors; see `EnvironmentModel.check_experience`."""
        strange = experience.mask & ~self._matches(experience, np).any(-1)
        if strange.any():
            row = int(strange.argmax())
            state = f"state {int(experience.next_observation[row])}"
            to = "the end of the episode" if experience.terminated[row] else state
            raise ControlError(
                f"state {int(experience.observation[row])}, action {int(experience.action[row])} led to {to}, which is "
                "not among the successors of the model; add it, or leave successors out"
            )


def _allowed(allowed: Any, at: Array, values: Array) -> Array:
    """Set the values of actions that states do not allow to −inf, [..., actions]."""
    return values if allowed is None else jnp.where(jnp.asarray(allowed)[at], values, -jnp.inf)


def _shared(successors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give each action the outcomes of all actions of its state, [states, actions, K], and flag the padding."""
    states, actions, _ = successors.shape
    found = [np.unique(row) for row in successors.reshape(states, -1)]
    most = max(map(len, found))
    padded = np.stack([np.resize(row, most) for row in found])
    again = np.arange(most) >= np.array([len(row) for row in found])[:, None]
    shape = (states, actions, most)
    return np.broadcast_to(padded[:, None], shape), np.broadcast_to(again[:, None], shape)
