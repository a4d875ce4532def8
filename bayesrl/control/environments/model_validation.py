"""Check a published model in play: try every action in every state, then whole episodes."""

from collections import Counter
from collections.abc import Callable
from math import isclose
from typing import Any

import numpy as np

from bayesrl.arguments import user_code
from bayesrl.control.action_masks import parse_mask, read_mask
from bayesrl.control.environments.published_models import Outcomes, PublishedModel, observation_key
from bayesrl.control.gymnasium.spaces import MASK, Actions
from bayesrl.errors import ControlError

_MAX_TRIALS = 4000
"""Most steps from chosen states, over all states and actions."""

_MAX_TRIALS_EACH = 40
_EPISODES, _MAX_STEPS = 25, 2500
"""Most episodes by each policy, and most steps over all of them."""

_STARTS = 200
_MAX_DEVIATIONS = 7.0
"""Bound on a pooled chi-square statistic, in standard deviations: fewer than 1e-6 false alarms, long tail included."""


def validate_model(
    model: PublishedModel, plan: Callable[[], np.ndarray | None], *, masked: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Play, and refuse a model that play contradicts.

    If the environment can be put into a chosen state, each action in each reachable state is tried. Then whole
    episodes follow, at random and by the model's best policy. Every outcome must be one of the model's, at the
    model's frequency. False alarms are fewer than one in a million environments; differences rarer than one in a few
    thousand steps go unnoticed.

    Args:
        model: the published model.
        plan: returns the best actions by the model, [states], or None.
        masked: whether to try only the actions that the environment's masks allow.

    Returns:
        Distribution of the first state, [states], and the actions that each state allows, [states, actions], if masked.
    """
    trial = _Trial(model, masked=masked)
    # Seeded once, so that a second trial of the same environment plays the same steps.
    trial.ask(lambda: model.core.reset(seed=0))
    starts = np.bincount([trial.reset() for _ in range(_STARTS)], minlength=len(model.seen))
    start = trial.start_distribution(starts)
    trial.sweep(start)
    trial.play(trial.random_action)
    best = plan()
    if best is not None:
        trial.play(lambda state: int(best[state]))
        # A fifth of the actions are random, to meet the states beside the best way.
        trial.play(lambda s: int(best[s]) if trial.rng.random() < 0.8 else trial.random_action(s))
    pooled = [_pool(model.table[state][action], counts) for (state, action), counts in trial.counts.items()]
    _check_frequencies(pooled, "what follows on actions")
    return start, trial.allowed_actions(start) if masked else None


class _Trial:
    """The steps played so far: counts of each outcome, and the actions that each state allows."""

    def __init__(self, model: PublishedModel, *, masked: bool) -> None:
        self.model, self.rng, self.masked = model, np.random.default_rng(0), masked
        self.masks: dict[int, np.ndarray] = {}
        self.counts: dict[tuple[int, int], Counter[int]] = {}
        self._states = {observation_key(seen): s for s, seen in enumerate(model.seen)}

    def random_action(self, state: int) -> int:
        mask = self.masks.get(state)
        return int(self.rng.choice(len(self.model.actions) if mask is None else np.flatnonzero(mask)))

    def allowed_actions(self, start: np.ndarray) -> np.ndarray:
        """Flag the actions that states allow; all of them in states where no action is taken."""
        allowed = np.ones((len(self.model.seen), len(self.model.actions)), bool)
        for state, mask in self.masks.items():
            allowed[state] = mask
        unknown = [state for state in self._reachable(start) if state not in self.masks]
        if unknown:
            raise ControlError(f"state {unknown[0]} was not reached in play, so what it allows is not known")
        return allowed

    def _note_mask(self, state: int, seen: Any, info: Any) -> None:
        if not self.masked:
            return
        core, number = self.model.core, len(self.model.actions)
        told = read_mask(core, seen, info, within=isinstance(seen, dict) and MASK in seen)
        mask = np.ones(number, bool) if told is None else parse_mask(told, Actions(number), str(core))
        if not mask.any():
            raise ControlError(f"state {state} allows no action, and the episode goes on")
        if (self.masks.setdefault(state, mask) != mask).any():
            raise ControlError(f"state {state} does not always allow the same actions")

    def _state_of(self, seen: Any) -> int:
        state = self._states.get(observation_key(seen))
        if state is None:
            raise ControlError(f"{seen!r} was observed in play, which the published model does not know")
        return state

    def reset(self) -> int:
        seen, info = self.ask(self.model.core.reset)
        state = self._state_of(seen)
        self._note_mask(state, seen, info)
        return state

    def ask(self, call: Callable[[], Any]) -> Any:
        with user_code(f"trying the published model of {self.model.bare}", ControlError, "mend the environment"):
            return call()

    def start_distribution(self, starts: np.ndarray) -> np.ndarray:
        """Return the published distribution of the first state, or the one state where all episodes start."""
        start = self.model.start
        if start is None:
            if (starts > 0).sum() > 1:
                raise ControlError(
                    f"episodes start in {(starts > 0).sum()} states, and no initial_state_distrib says how often in "
                    "each"
                )
            return starts / starts.sum()
        odd = np.flatnonzero((starts > 0) & (start == 0))
        if len(odd):
            raise ControlError(f"an episode started in state {odd[0]}, to which initial_state_distrib gives 0")
        _check_frequencies([(start, starts)], "the first states of episodes")
        return start

    def _reachable(self, start: np.ndarray) -> list[int]:
        """List the states in which an agent may have to act."""
        front = np.flatnonzero(start > 0).tolist()
        found = set(front)
        while front:
            state = front.pop()
            mask = self.masks.get(state)
            row = [o for a, o in enumerate(self.model.table[state]) if mask is None or mask[a]]
            new = {to for outcomes in row for p, to, _, end in outcomes if p > 0 and not end} - found
            found |= new
            front += sorted(new)
        return sorted(found)

    def _state_attribute(self) -> str | None:
        """Find the one attribute of the environment that holds the state, by playing some steps."""
        bare, names = self.model.bare, None
        state = self.reset()
        for _ in range(40):
            here = self.model.inside[state]
            # Types are checked, because a space, too, has an integer dtype.
            numbers = {
                n: v for n, v in vars(bare).items() if isinstance(v, int | np.integer) and not isinstance(v, bool)
            }
            same = {name for name, value in numbers.items() if int(value) == here}
            names = same if names is None else names & same
            state, over = self._step(state, self.random_action(state))
            if over:
                state = self.reset()
        # If several attributes always matched, play did not tell which of them holds the state.
        return next(iter(names)) if names is not None and len(names) == 1 else None

    def _step(self, state: int, action: int) -> tuple[int, bool]:
        """Take a step, and refuse an outcome that the model does not know."""
        seen, earned, ended, cut, info = self.ask(lambda: self.model.core.step(self.model.actions[action]))
        earned, after = float(earned), self._state_of(seen)
        if not (ended or cut):
            self._note_mask(after, seen, info)
        same = [
            k
            for k, (p, to, r, end) in enumerate(self.model.table[state][action])
            if p > 0 and to == after and end == bool(ended) and isclose(r, earned, rel_tol=1e-6, abs_tol=1e-9)
        ]
        event = f"action {action} in state {state} led to state {after} with reward {earned:g}"
        if cut:
            raise ControlError(f"{event} and cut the episode off, and the published model knows no such limit")
        if not same:
            raise ControlError(
                f"{event}{' and ended the episode' if ended else ''}, to which the published model gives probability "
                "0: it does not say what `step` does"
            )
        self.counts.setdefault((state, action), Counter())[same[0]] += 1
        return after, bool(ended)

    def sweep(self, start: np.ndarray) -> None:
        """Try every action in every reachable state, each in its own episode."""
        pairs = [(s, a) for s in self._reachable(start) for a in range(len(self.model.actions))]
        name = self._state_attribute()
        if name is None:
            return
        if len(pairs) > _MAX_TRIALS:
            pairs = [pairs[i] for i in self.rng.choice(len(pairs), _MAX_TRIALS, replace=False)]
        for _ in range(max(min(_MAX_TRIALS // len(pairs), _MAX_TRIALS_EACH), 1)):
            left, before = pairs, len(pairs) + 1
            while len(left) < before:  # a state's mask may become known only when play gets there
                before, later = len(left), []
                for state, action in left:
                    mask = self.masks.get(state)
                    if self.masked and mask is None:
                        later.append((state, action))
                    elif mask is None or mask[action]:
                        self.reset()
                        setattr(self.model.bare, name, self.model.inside[state])
                        self._step(state, action)
                left = later

    def play(self, choose: Callable[[int], int]) -> None:
        """Play whole episodes by a policy."""
        steps = 0
        # An episode takes a tenth of the steps at most, so that several are played.
        longest = min(self.model.limit or _MAX_STEPS, _MAX_STEPS // 10)
        for _ in range(_EPISODES):
            state, over, length = self.reset(), False, 0
            while not over and length < longest:
                action = choose(state)
                if self.masked and not self.masks[state][action]:
                    action = self.random_action(state)
                state, over = self._step(state, action)
                length += 1
            steps += length
            if steps > _MAX_STEPS:
                return


def _check_frequencies(pooled: list[tuple[np.ndarray, np.ndarray]], what: str) -> None:
    """Compare counts with probabilities over all distributions, by Pearson's statistic and by log-probabilities.

    The first is blind if each distribution was drawn from only a few times, the second if all outcomes are equally
    likely.
    """
    square, surprise = np.zeros(3), np.zeros(3)  # found, expected, variance
    for probs, drawn in pooled:
        p, number, n = probs[probs > 0], drawn[probs > 0], int(drawn.sum())
        logs = np.log(p)
        mean = float(p @ logs)
        surprise += float(number @ logs), n * mean, n * float(p @ (logs - mean) ** 2)
        p, number = _lump_rare(p, number, n)
        k, n = len(p), int(number.sum())
        if k > 1 and n > 0:
            # The exact variance of Pearson's statistic, for few draws too.
            spread = 2 * (k - 1) + (float((1 / p).sum()) - k**2 - 2 * k + 2) / n
            square += float(((number - n * p) ** 2 / (n * p)).sum()), k - 1, spread
    for name, (found, expected, variance) in {"chi-square": square, "log-probability": surprise}.items():
        # Counts that are nearer to the probabilities than chance allows are no reason to refuse.
        far = found - expected if name == "chi-square" else abs(found - expected)
        # If all outcomes are equally likely, the variance of log-probabilities is 0, and rounding remains.
        if far > _MAX_DEVIATIONS * variance**0.5 + 1e-6 * abs(expected):
            raise ControlError(
                f"{what} are not as frequent in play as the published model says: their {name} is {found:.5g}, "
                f"and {expected:.5g} ± {variance**0.5:.2g} is expected"
            )


def _lump_rare(p: np.ndarray, number: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Lump outcomes with an expected count below 1, so that one of them does not outweigh all others."""
    rare = n * p < 1
    if not rare.any():
        return p, number
    lump, count = p[rare].sum(), number[rare].sum()
    # Rare even together: leave them out, and count the draws of the others alone.
    if n * lump < 1:
        return p[~rare] / p[~rare].sum(), number[~rare]
    return np.append(p[~rare], lump), np.append(number[~rare], count)


def _pool(outcomes: Outcomes, counter: Counter[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pool outcomes that look the same in play, and return their probabilities and counts."""
    kinds: dict[tuple[int, float, bool], tuple[float, int]] = {}
    for k, (p, to, r, end) in enumerate(outcomes):
        mass, number = kinds.get((to, r, end), (0.0, 0))
        kinds[to, r, end] = (mass + p, number + counter[k])
    table = np.array(list(kinds.values()), float)
    return table[:, 0], table[:, 1]
