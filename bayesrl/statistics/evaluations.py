"""What an engine's answer cost: how often it evaluated the program."""

from typing import NamedTuple


class Evaluations(NamedTuple):
    """How often a program was evaluated, in draws of all its contexts; a gradient counts as one.

    Attributes:
        policy: number of draws that π₀, or a guide, made or scored.
        reward: number of draws whose reward was computed.
    """

    policy: int = 0
    reward: int = 0

    @classmethod
    def of_both(cls, number: int) -> "Evaluations":
        """Count draws whose policy and reward were evaluated together."""
        return cls(int(number), int(number))

    def plus(self, other: "Evaluations") -> "Evaluations":
        """Add another count."""
        return Evaluations(self.policy + other.policy, self.reward + other.reward)
