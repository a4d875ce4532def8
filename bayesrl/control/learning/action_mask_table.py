"""Action masks of finitely many states, as far as they are known."""

import numpy as np

from bayesrl.control.learning.replay_memory import Episode
from bayesrl.errors import ControlError


class ActionMaskTable:
    """The actions that each of finitely many states allows: all, until a mask is seen there."""

    def __init__(self, num_states: int, num_actions: int) -> None:
        # The union of the masks seen in each state; each mask allows an action, so a row without one was never seen.
        self._seen = np.zeros((num_states, num_actions), bool)

    @property
    def known(self) -> np.ndarray:
        """Whether a mask was seen in each state, [states]."""
        return self._seen.any(-1)

    @property
    def table(self) -> np.ndarray:
        """[states, actions], bool; a state seen with several masks allows what any of them allows."""
        return self._seen | ~self.known[:, None]

    def note(self, episode: Episode, *, same: bool) -> None:
        """Record the masks of an episode; refuse a state that must allow the same actions each time and does not."""
        assert episode.allowed is not None
        states = np.append(episode.observation, episode.next_observation[-1:])
        # No action follows the end of an episode, so its last mask does not count.
        number = len(episode.reward) + (not episode.terminated)
        # On a copy: an episode that is refused must leave the table as it was.
        seen = self._seen.copy()
        for state, allowed in zip(states[:number].tolist(), episode.allowed[:number], strict=True):
            if same and allowed.any() and seen[state].any() and (seen[state] != allowed).any():
                raise ControlError(
                    f"state {state} allowed actions {np.flatnonzero(seen[state]).tolist()} before and "
                    f"{np.flatnonzero(allowed).tolist()} now, and the model plans by what each state allows; let "
                    "observations tell the two apart, or use LinearValues"
                )
            seen[state] |= allowed
        self._seen = seen

    def array(self) -> np.ndarray:
        """Return the array that a checkpoint must keep, [states, actions + 1]."""
        return np.concatenate([self.table, self.known[:, None]], -1)

    def restore(self, array: np.ndarray) -> None:
        """Restore the table from a checkpoint."""
        flags = array.astype(bool)
        # `table` allows all where nothing was seen; those rows become empty again.
        self._seen = flags[:, :-1] & flags[:, -1:]
