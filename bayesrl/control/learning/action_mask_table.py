"""Action masks of finitely many states, as far as they are known."""

import numpy as np

from bayesrl.control.learning.env_adapter import EnvAdapter
from bayesrl.control.learning.replay_memory import Episode
from bayesrl.errors import ControlError


class ActionMaskTable:
    """The actions that each of finitely many states allows: all, until a mask is seen there.

    Args:
        num_states: number of states.
        num_actions: number of actions.

    Attributes:
        table: [states, actions], bool; a state seen with several masks allows what any of them allows.
        known: whether a mask was seen in each state, [states].
    """

    def __init__(self, num_states: int, num_actions: int) -> None:
        self.table = np.ones((num_states, num_actions), bool)
        self.known = np.zeros(num_states, bool)

    @classmethod
    def for_env(cls, env: EnvAdapter) -> "ActionMaskTable | None":
        """Make the table of an environment before play; None without masks, or without finitely many states."""
        if not env.masked or env.num_observations is None:
            return None
        return cls(env.num_observations, env.num_actions)

    def note(self, episode: Episode, *, same: bool) -> None:
        """Record the masks of an episode.

        Args:
            episode: an episode with masks.
            same: whether a state must allow the same actions each time.

        Raises:
            ControlError: a state must allow the same actions, and does not.
        """
        assert episode.allowed is not None
        states = np.append(episode.observation, episode.next_observation[-1:])
        # No action follows the end of an episode, so its last mask does not count.
        number = len(episode.reward) + (not episode.terminated)
        table, known = self.table.copy(), self.known.copy()
        for state, allowed in zip(states[:number].tolist(), episode.allowed[:number], strict=True):
            if not allowed.any():
                continue
            if same and known[state] and (table[state] != allowed).any():
                raise ControlError(
                    f"state {state} allowed actions {np.flatnonzero(table[state]).tolist()} before and "
                    f"{np.flatnonzero(allowed).tolist()} now, and the model plans by what each state allows; let "
                    "observations tell the two apart, or use LinearValues"
                )
            # The row of an unknown state is all True, and must not join the union.
            table[state] = (table[state] & known[state]) | allowed
            known[state] = True
        self.table, self.known = table, known

    def array(self) -> np.ndarray:
        """Return the array that a checkpoint must keep, [states, actions + 1]."""
        return np.concatenate([self.table, self.known[:, None]], -1)

    def restore(self, array: np.ndarray) -> None:
        """Restore the table from a checkpoint."""
        self.table, self.known = array[:, :-1].astype(bool), array[:, -1].astype(bool)
