"""Whether a published model says what is played: every action in every state, and whole episodes, are tried."""

from collections import Counter
from collections.abc import Callable, Iterator
from math import isclose
from typing import Any

import numpy as np

from bayesrl.control.action_masks import parse_mask, read_mask
from bayesrl.control.environments.published_models import Outcomes, PublishedModel, observation_key
from bayesrl.control.gymnasium.spaces import MASK, Actions
from bayesrl.errors import ControlError
from bayesrl.values import is_integer

_TRIES = 4000
"""Steps that begin in a state of choice, over all states and actions."""

_MOST_TRIES = 40
"""For one action in one state."""

_EPISODES, _STEPS = 25, 2500
"""Episodes of each kind, and steps of all of them."""

_STARTS = 200
_ODD = 7.0
"""Standard deviations of a pooled chi-square statistic that are no chance: below 1e-6 also where it has a long tail."""


def validate_model(
    model: PublishedModel, plan: Callable[[], np.ndarray | None], *, masked: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Play, and refuse a model that does not say what is seen.

    Each action in each state that can be reached is tried where the environment lets itself be put there, then whole
    episodes are played, by chance and by what the model thinks best. Every outcome must be one of the model's, and
    their frequencies those that it tells, with a false alarm in fewer than one of a million environments. A
    difference that is rarer than one in some thousand steps is not seen.

    Args:
        model: what is published.
        plan: gives the best actions by the model, [states], or None.
        masked: whether only actions are tried that the environment's masks allow.

    Returns:
        Distribution of the first state, [states], and which actions states allow, [states, actions], if masked.

    Raises:
        ControlError: what is played is something else; masks are not told in every state, or differ in one.
    """
    return _Trial(model, masked=masked).verdict(plan)


class _Trial:
    def __init__(self, model: PublishedModel, *, masked: bool) -> None:
        self.masks: dict[int, np.ndarray] | None = {} if masked else None
        self.model, self.rng = model, np.random.default_rng(0)
        self.states = {observation_key(seen): s for s, seen in enumerate(model.seen)}
        self.seen: dict[tuple[int, int], Counter[int]] = {}
        self.starts: Counter[int] = Counter()

    def verdict(self, plan: Callable[[], np.ndarray | None]) -> tuple[np.ndarray, np.ndarray | None]:
        """Try all, and give the distribution of the first state, and what states allow."""
        self._asked(lambda: self.model.core.reset(seed=0))
        for _ in range(_STARTS):
            self.starts[self._reset()] += 1
        start = self._start()
        reached = self._reached(start)
        name = self._name_of_state()
        if name is not None:
            self._sweep(name, reached)
        self._play(self._any)
        best = plan()
        if best is not None:
            self._play(lambda state: int(best[state]))
            self._play(lambda s: int(best[s]) if self.rng.random() < 0.8 else self._any(s))
        self._compare()
        return start, self._allowed(start)

    def _any(self, state: int) -> int:
        mask = None if self.masks is None else self.masks.get(state)
        among = len(self.model.actions) if mask is None else np.flatnonzero(mask)
        return int(self.rng.choice(among))

    def _allowed(self, start: np.ndarray) -> np.ndarray | None:
        """Give what states allow; all, where nothing can be done in one."""
        if self.masks is None:
            return None
        told = np.ones((len(self.model.seen), len(self.model.actions)), bool)
        for state, mask in self.masks.items():
            told[state] = mask
        unknown = [state for state in self._reached(start) if state not in self.masks]
        if unknown:
            raise ControlError(f"state {unknown[0]} was not reached in play, so that what it allows is not known")
        return told

    def _heed(self, state: int, seen: Any, info: Any) -> None:
        """Note what a state allows."""
        if self.masks is None:
            return
        core, number = self.model.core, len(self.model.actions)
        told = read_mask(core, seen, info, within=isinstance(seen, dict) and MASK in seen)
        mask = np.ones(number, bool) if told is None else parse_mask(told, Actions(number), str(core))
        if not mask.any():
            raise ControlError(f"state {state} allows no action, and the episode goes on")
        if (self.masks.setdefault(state, mask) != mask).any():
            raise ControlError(f"state {state} does not always allow the same actions")

    def _state(self, seen: Any) -> int:
        found = self.states.get(observation_key(seen))
        if found is None:
            raise ControlError(f"{seen!r} was observed in play, which the published model does not know")
        return found

    def _reset(self) -> int:
        seen, info = self._asked(self.model.core.reset)
        state = self._state(seen)
        self._heed(state, seen, info)
        return state

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except Exception as error:
            raise ControlError(
                f"the published model of {self.model.bare} could not be tried, since playing raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def _start(self) -> np.ndarray:
        """Give the published distribution of the first state, or the one state that all episodes start in."""
        states = len(self.model.seen)
        if self.model.start is None:
            if len(self.starts) > 1:
                raise ControlError(
                    f"episodes start in {len(self.starts)} states, and no initial_state_distrib tells how often in each"
                )
            return np.eye(states)[next(iter(self.starts))]
        start = self.model.start
        if start.shape != (states,):
            raise ControlError(f"initial_state_distrib has {len(start)} numbers, and the table P has {states} states")
        odd = [state for state in self.starts if start[state] == 0]
        if odd:
            raise ControlError(f"an episode started in state {odd[0]}, to which initial_state_distrib gives 0")
        self._judge(
            [(start, np.bincount(list(self.starts.elements()), minlength=states))], "the first states of episodes"
        )
        return start

    def _reached(self, start: np.ndarray) -> list[int]:
        """Give the states that may be acted in."""
        found, front = set(np.flatnonzero(start > 0).tolist()), list(np.flatnonzero(start > 0).tolist())
        while front:
            state = front.pop()
            mask = None if self.masks is None else self.masks.get(state)
            row = [o for a, o in enumerate(self.model.table[state]) if mask is None or mask[a]]
            new = {to for outcomes in row for p, to, _, end in outcomes if p > 0 and not end} - found
            found |= new
            front += sorted(new)
        return sorted(found)

    def _name_of_state(self) -> str | None:
        """Find the one attribute that holds the state, by playing some steps."""
        bare, names = self.model.bare, None
        state = self._reset()
        for _ in range(40):
            here = self.model.inside[state]
            held = {name for name, value in vars(bare).items() if is_integer(value) and int(value) == here}
            names = held if names is None else names & held
            state, over = self._step(state, self._any(state))
            if over:
                state = self._reset()
        # One that never moved may be anything.
        return next(iter(names)) if names is not None and len(names) == 1 else None

    def _step(self, state: int, action: int) -> tuple[int, bool]:
        """Take a step, and refuse what the model does not know."""
        seen, earned, ended, cut, info = self._asked(lambda: self.model.core.step(self.model.actions[action]))
        earned = float(earned)
        if not (ended or cut):
            self._heed(self._state(seen), seen, info)
        after, outcomes = self._state(seen), self.model.table[state][action]
        same = [
            k
            for k, (p, to, r, end) in enumerate(outcomes)
            if p > 0 and to == after and end == bool(ended) and isclose(r, earned, rel_tol=1e-6, abs_tol=1e-9)
        ]
        told = f"action {action} in state {state} led to state {after} with reward {earned:g}"
        if cut:
            raise ControlError(f"{told} and cut the episode off, and the published model knows no such limit")
        if not same:
            raise ControlError(
                f"{told}{' and ended the episode' if ended else ''}, to which the published model gives probability 0: "
                "it does not say what `step` does"
            )
        self.seen.setdefault((state, action), Counter())[same[0]] += 1
        return after, bool(ended)

    def _sweep(self, name: str, reached: list[int]) -> None:
        """Try every action in every state, each from an episode of its own."""
        pairs = [(s, a) for s in reached for a in range(len(self.model.actions))]
        if len(pairs) > _TRIES:
            pairs = [pairs[i] for i in self.rng.choice(len(pairs), _TRIES, replace=False)]
        for _ in range(max(min(_TRIES // len(pairs), _MOST_TRIES), 1)):
            left, before = pairs, len(pairs) + 1
            while len(left) < before:  # what a state allows may be seen only when another one has led there
                before, later = len(left), []
                for state, action in left:
                    mask = None if self.masks is None else self.masks.get(state)
                    if self.masks is not None and mask is None:
                        later.append((state, action))
                    elif mask is None or mask[action]:
                        self._reset()
                        setattr(self.model.bare, name, self.model.inside[state])
                        self._step(state, action)
                left = later

    def _play(self, choose: Callable[[int], int]) -> None:
        steps = 0
        longest = min(self.model.limit or _STEPS, _STEPS // 10)
        for _ in range(_EPISODES):
            state, over, length = self._reset(), False, 0
            while not over and length < longest:
                action = choose(state)
                if self.masks is not None and not self.masks[state][action]:
                    action = self._any(state)
                state, over = self._step(state, action)
                length += 1
            steps += length
            if steps > _STEPS:
                return

    def _compare(self) -> None:
        def counted() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for (state, action), counter in self.seen.items():
                outcomes = self.model.table[state][action]
                yield _pooled(outcomes, counter)

        self._judge(list(counted()), "what follows on actions")

    def _judge(self, counts: list[tuple[np.ndarray, np.ndarray]], what: str) -> None:
        """Compare counts with probabilities, by Pearson's statistic and by log-probabilities, over all distributions.

        The first is blind where few were drawn of each, the second where all outcomes are as likely.
        """
        square, surprise = np.zeros(3), np.zeros(3)  # what was found, what is expected, and its variance
        for told, drawn in counts:
            p, number, n = told[told > 0], drawn[told > 0], int(drawn.sum())
            logs = np.log(p)
            mean = float(p @ logs)
            surprise += float(number @ logs), n * mean, n * float(p @ (logs - mean) ** 2)
            p, number = _lumped(p, number, n)
            k, n = len(p), int(number.sum())
            if k > 1 and n > 0:
                spread = 2 * (k - 1) + (float((1 / p).sum()) - k**2 - 2 * k + 2) / n
                square += float(((number - n * p) ** 2 / (n * p)).sum()), k - 1, spread
        for name, (found, expected, variance) in {"chi-square": square, "log-probability": surprise}.items():
            far = found - expected if name == "chi-square" else abs(found - expected)
            if far > _ODD * variance**0.5 + 1e-6 * abs(expected):
                raise ControlError(
                    f"{what} are not as frequent in play as the published model tells: their {name} is {found:.5g}, "
                    f"and {expected:.5g} ± {variance**0.5:.2g} is expected"
                )


def _lumped(p: np.ndarray, number: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Put outcomes that are expected less than once together, lest one of them count as much as all others."""
    rare = n * p < 1
    if not rare.any():
        return p, number
    kinds = [(p[~rare], number[~rare]), (p[rare].sum(keepdims=True), number[rare].sum(keepdims=True))]
    if n * kinds[1][0][0] < 1:
        return p[~rare] / p[~rare].sum(), number[~rare]
    return np.concatenate([kinds[0][0], kinds[1][0]]), np.concatenate([kinds[0][1], kinds[1][1]])


def _pooled(outcomes: Outcomes, counter: Counter[int]) -> tuple[np.ndarray, np.ndarray]:
    """Give probabilities and counts of the outcomes that differ in what can be seen."""
    kinds: dict[tuple[int, float, bool], tuple[float, int]] = {}
    for k, (p, to, r, end) in enumerate(outcomes):
        mass, number = kinds.get((to, r, end), (0.0, 0))
        kinds[to, r, end] = (mass + p, number + counter[k])
    told = np.array(list(kinds.values()), float)
    return told[:, 0], told[:, 1]
