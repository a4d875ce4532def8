"""A monotone map of the line that bends a distribution: it skews it and makes its tails heavier or lighter.

With v = (z − k)/w and e = ε + δ·asinh v the map is

    s(z) = k + w·(sinh e − sinh ε)/(δ·cosh ε),

the sinh-arcsinh transformation of Jones & Pewsey (2009, Biometrika 96), normalised so that s(k) = k and s′(k) = 1.
Knot k and width w set where it bends, ε how much steeper it is on one side than on the other, and δ how it grows far
away. For ε = 0 and δ = 1 it is the identity. As w → 0 it has one slope left of the knot and another right of it.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

NUM_NUMBERS = 4
"""How many numbers bend one coordinate: ε, log δ, and the shifts of knot and log-width."""

_MOST = (4.0, 3.0, 40.0, 4.0)
"""Bounds of these numbers, approached smoothly; beyond them the map has no inverse in single precision."""

_FARTHEST = 60.0
"""exp overflows single precision beyond 88, and the widths need room too."""

_LOG_2 = math.log(2.0)


class SinhArcsinh:
    """The map s, element by element, with its inverse.

    Args:
        numbers: [..., 4 N] of N coordinates: all ε, then log δ, shifts of the knot in widths, log-ratios of the width.
        centre: the initial knot, [..., N].
        width: the initial width, [..., N].
    """

    def __init__(self, numbers: Array, centre: Array, width: Array) -> None:
        most = np.repeat(np.asarray(_MOST, np.float32), numbers.shape[-1] // NUM_NUMBERS)
        self.skew, log_tail, moved, log_width = jnp.split(most * jnp.tanh(numbers / most), NUM_NUMBERS, -1)
        self.tail = jnp.exp(log_tail)
        self.knot, self.width = centre + width * moved, width * jnp.exp(log_width)
        self.up, self.down = jnp.exp(self.skew), jnp.exp(-self.skew)
        self.log_cosh = _log_cosh(self.skew)
        self.slope = self.tail * (self.up + self.down) / 2

    def forward(self, z: Array) -> tuple[Array, Array]:
        """Return s(z) and log s′(z), each [..., N]; expm1 makes it exact near the knot."""
        far = _bounded(jnp.arcsinh((z - self.knot) / self.width))
        grown = _bounded(self.tail * far)
        bent = (self.up * jnp.expm1(grown) - self.down * jnp.expm1(-grown)) / (2 * self.slope)
        return self.knot + self.width * bent, self._log_slope(far, grown)

    def inverse(self, s: Array) -> tuple[Array, Array, Array]:
        """Return z, z − s and log s′(z), each [..., N]; the difference is exact where it is small."""
        bent = (s - self.knot) / self.width
        grown = _bounded(self._asinh(bent * self.slope))
        far = _bounded(grown / self.tail)
        unbent = (jnp.expm1(far) - jnp.expm1(-far)) / 2
        return self.knot + self.width * unbent, self.width * (unbent - bent), self._log_slope(far, grown)

    def _log_slope(self, far: Array, grown: Array) -> Array:
        return _log_cosh(self.skew + grown) - self.log_cosh - _log_cosh(far)

    def _asinh(self, step: Array) -> Array:
        """asinh(sinh ε + step) − ε, without cancellation."""
        sinh, cosh = (self.up - self.down) / 2, (self.up + self.down) / 2
        # asinh a − asinh s = asinh(a·√(1 + s²) − s·√(1 + a²)). If both terms have one sign, they cancel: there divide
        # the difference of their squares, a² − s² = step·(a + s), by their sum.
        after = sinh + step
        ahead, behind = after * cosh, sinh * jnp.hypot(1.0, after)
        alike = sinh * after > 0
        # 1 where the quotient is not used, so that its gradient is finite there.
        both = jnp.where(alike, ahead + behind, 1.0)
        return jnp.arcsinh(jnp.where(alike, step * ((sinh + after) / both), ahead - behind))


def _log_cosh(x: Array) -> Array:
    return abs(x) + jnp.log1p(jnp.exp(-2 * abs(x))) - _LOG_2


def _bounded(far: Array) -> Array:
    return jnp.clip(far, -_FARTHEST, _FARTHEST)
