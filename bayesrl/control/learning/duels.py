"""`Duels`: a person, or a simulated one, who says which of two items is better."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from bayesrl.argument_types import Requirement
from bayesrl.arguments import CountAboveOne, checked, user_code
from bayesrl.control.learning.env_adapter import EnvAdapter, EpisodePolicy
from bayesrl.control.learning.replay_memory import Episode
from bayesrl.errors import ControlError
from bayesrl.exact.weighted_draws import numpy_generator
from bayesrl.typing import PRNGKey
from bayesrl.value_checks import are_finite, is_function

type Oracle = Annotated[
    Any,
    Requirement(
        "a function of two numbers of items that says 1 (the first is better) or 0, or scores [items]",
        lambda one: is_function(one) or are_finite(one),
        any_type=True,
    ),
]


@checked(ControlError)
class Duels(EnvAdapter):
    """Comparisons of items as an environment of `learn`: an episode names an item, then another, and gets an answer.

    Observation 0 is the start, and observation 1 + i says that item i was named first; the last reward is 1 where the
    first is preferred. The regret of a question is max(score) minus the greater of its two scores, log-odds, if scores
    are known: 0 once the best item is always one of the two.

    Args:
        oracle: a function from the numbers of two items to 1, the first is better, or 0; or the scores of a simulated
            person, log-odds, [items], who answers by Bradley and Terry's model.
        num_items: how many items there are, for a function without names.
        names: of the items.

    Raises:
        ControlError: the number of items is not known, or below 2.

    Example:
        >>> import jax
        >>> from bayesrl import control
        >>> agent = control.BayesianAgent(control.DuelsModel(3), num_samples=256)
        >>> duels = control.Duels([0.0, 1.0, 3.0])
        >>> rule = control.most_informative()
        >>> asked = control.learn(jax.random.key(0), duels, agent, exploration=rule, num_episodes=30, progress=False)
        >>> int(asked.decide(jax.random.key(1), 0).p_optimal.argmax())
        2

    References:
        Yue, Broder, Kleinberg & Joachims (2012), "The K-armed dueling bandits problem"; the regret is their weak one.
    """

    max_steps = 2
    masked = True
    name = "duels"
    unknown = "an answer pays nothing by itself"

    def __init__(self, oracle: Oracle, *, num_items: CountAboveOne | None = None, names: Sequence[str] = ()) -> None:
        scores = None if is_function(oracle) else np.asarray(oracle, float)
        known = [n for n in (num_items, len(names) or None, None if scores is None else scores.size) if n is not None]
        if not known or len(set(known)) > 1 or known[0] < 2 or (scores is not None and scores.ndim != 1):
            raise ControlError(
                f"num_items={num_items}, {len(names)} names and "
                f"{'a function' if scores is None else f'scores of shape {scores.shape}'} do not tell how many items "
                "there are; give at least two, each once"
            )
        self.num_actions, self.num_observations = known[0], known[0] + 1
        self.action_names = tuple(names) or tuple(map(str, range(known[0])))
        self.values = () if scores is None else scores
        self._oracle, self._scores, self._first = oracle, scores, -1
        self._rng = np.random.default_rng(0)

    def begin(self, key: PRNGKey) -> np.ndarray:
        """Ask for the first item."""
        self._rng, self._first = numpy_generator(key), -1
        self.allowed = np.ones(self.num_actions, bool)
        return np.asarray(0)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """Take the first item, or take the second and get the answer."""
        if self._first < 0:
            self._first = action
            self.allowed = np.arange(self.num_actions) != action
            return np.asarray(action + 1), 0.0, False, False
        self.allowed = np.ones(self.num_actions, bool)
        return np.asarray(0), self._answer(self._first, action), True, False

    def _answer(self, first: int, second: int) -> float:
        if self._scores is not None:
            return float(self._rng.logistic() < self._scores[first] - self._scores[second])
        with user_code("the oracle", ControlError, "let it take the numbers of two items and return 1 or 0"):
            answer = self._oracle(first, second)
        if np.ndim(answer) or answer not in (0, 1):
            raise ControlError(
                f"the oracle said {answer!r} of items {first} and {second}; let it return 1, the first is better, or 0"
            )
        return float(answer)

    def regret(self, episode: Episode, act: EpisodePolicy) -> float:
        """Compute how much less the better of the two items is worth than the best one, log-odds; nan if not known."""
        return np.nan if self._scores is None else float(self._scores.max() - self._scores[episode.action].max())
