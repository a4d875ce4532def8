"""Action masks of finitely many states, as far as they were seen."""

import numpy as np

from bayesrl.control.learning.env_adapter import EnvAdapter
from bayesrl.control.learning.replay_memory import Episode
from bayesrl.errors import ControlError


class ActionMaskTable:
    """Which actions each of finitely many states allows: all, until a mask is seen there.

    Args:
        num_states: number of states.
        num_actions: number of actions.

    Attributes:
        table: [states, actions], bool; of a state that was seen with several masks, what any of them allows.
        known: where a mask was seen, [states].
    """

    def __init__(self, num_states: int, num_actions: int) -> None:
        self.table = np.ones((num_states, num_actions), bool)
        self.known = np.zeros(num_states, bool)

    @classmethod
    def for_env(cls, env: EnvAdapter) -> "ActionMaskTable | None":
        """Make the table of an environment before it is played; None where it has no masks, or no finite states."""
        if not env.masked or env.num_observations is None:
            return None
        return cls(env.num_observations, env.num_actions)

    def note(self, episode: Episode, *, same: bool) -> None:
        """Record the masks of an episode.

        Args:
            episode: with masks.
            same: whether a state has to allow the same each time.

        Raises:
            ControlError: it has to, and does not.
        """
        assert episode.allowed is not None
        states = np.append(episode.observation, episode.next_observation[-1:])
        # Where an episode has come to its end nothing is chosen.
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
            table[state] = (table[state] & known[state]) | allowed
            known[state] = True
        self.table, self.known = table, known

    def array(self) -> np.ndarray:
        """Give what a checkpoint has to keep, [states, actions + 1]."""
        return np.concatenate([self.table, self.known[:, None]], -1)

    def restore(self, array: np.ndarray) -> None:
        """Take what a checkpoint kept."""
        self.table, self.known = array[:, :-1].astype(bool), array[:, -1].astype(bool)
