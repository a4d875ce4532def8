"""CartPole and Pendulum as programs, with the physics of the Gymnasium environments of the same names."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from bayesrl.arguments import NonNegative, Positive, checked
from bayesrl.control.environments.base import Environment, Transition
from bayesrl.core.primitives import environment
from bayesrl.errors import ControlError


@checked(ControlError)
@dataclass(frozen=True)
class CartPole(Environment):
    """A pole on a cart, pushed left (0) or right (1); each step until it falls earns 1.

    The state is (position, velocity, angle, angular velocity) in m, m/s, rad, rad/s, and starts uniform in ±.05.
    The episode ends outside ±2.4 m or ±12°. One step is an Euler step of .02 s, as in Gymnasium's CartPole-v1.

    Example:
        >>> from bayesrl import control
        >>> control.Rollout(control.CartPole(), horizon=200).horizon
        200

    References:
        Barto, Sutton & Anderson (1983), appendix. Constants and integration: Gymnasium's CartPole-v1.
    """

    gravity: NonNegative = 9.8
    cart_mass: Positive = 1.0
    pole_mass: Positive = 0.1
    half_length: Positive = 0.5
    force: float = 10.0
    seconds: Positive = 0.02

    def reset(self) -> Array:
        """Draw the site `start`, [4]."""
        return environment("start", dist.Uniform(-0.05, 0.05).expand([4]).to_event(1), observable=True)

    def step(self, state: Array, action: Array) -> Transition:
        """Take one Euler step."""
        _, velocity, angle, spin = state
        push = jnp.where(action == 1, self.force, -self.force)
        mass = self.cart_mass + self.pole_mass
        sine, cosine = jnp.sin(angle), jnp.cos(angle)
        common = (push + self.pole_mass * self.half_length * spin**2 * sine) / mass
        inertia = self.half_length * (4.0 / 3.0 - self.pole_mass * cosine**2 / mass)
        turning = (self.gravity * sine - cosine * common) / inertia
        pulling = common - self.pole_mass * self.half_length * turning * cosine / mass
        rates = jnp.stack([velocity, pulling, spin, turning])
        new = state + self.seconds * rates
        fallen = (jnp.abs(new[0]) > 2.4) | (jnp.abs(new[2]) > 12 * jnp.pi / 180)
        return Transition(new, jnp.asarray(1.0), fallen)

    def prior(self, observation: Array) -> dist.Distribution:
        """Push left or right with equal probability."""
        return dist.Categorical(logits=jnp.zeros(2))

    def features(self, observation: Array) -> Array:
        """Scale the state to about unit size."""
        # Angles stay below 12°, which is .21 rad.
        return observation / jnp.array([1.0, 1.0, 0.2, 1.0])


@checked(ControlError)
@dataclass(frozen=True)
class Pendulum(Environment):
    """Swing up a pendulum by a torque within ±2 Nm; each step costs angle² + .1·speed² + .001·torque².

    The state is (angle, angular velocity) in rad and rad/s, and starts uniform in ±π and ±1. The agent sees
    (cos, sin, angular velocity). One step is a semi-implicit Euler step of .05 s, as in Gymnasium's Pendulum-v1.

    Example:
        >>> from bayesrl import control
        >>> program = control.Rollout(control.Pendulum(), horizon=200, discount=0.95, unbounded=True)
    """

    gravity: NonNegative = 10.0
    mass: Positive = 1.0
    length: Positive = 1.0
    seconds: Positive = 0.05

    def reset(self) -> Array:
        """Draw the site `start`, [2]."""
        high = jnp.array([jnp.pi, 1.0])
        return environment("start", dist.Uniform(-high, high).to_event(1), observable=True)

    def observe(self, state: Array) -> Array:
        """Return (cos, sin, angular velocity)."""
        return jnp.stack([jnp.cos(state[0]), jnp.sin(state[0]), state[1]])

    def step(self, state: Array, action: Array) -> Transition:
        """Take one step; torques are clipped to ±2."""
        angle, speed = state
        torque = jnp.clip(action, -2.0, 2.0)
        upright = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
        cost = upright**2 + 0.1 * speed**2 + 0.001 * torque**2
        turning = 1.5 * self.gravity / self.length * jnp.sin(angle) + 3.0 / (self.mass * self.length**2) * torque
        new_speed = jnp.clip(speed + self.seconds * turning, -8.0, 8.0)
        return Transition(jnp.stack([angle + self.seconds * new_speed, new_speed]), -cost, jnp.asarray(False))

    def prior(self, observation: Array) -> dist.Distribution:
        """Draw a torque from Normal(0, 1) Nm."""
        return dist.Normal(0.0, 1.0)

    def features(self, observation: Array) -> Array:
        """Scale the angular velocity to about unit size."""
        return observation / jnp.array([1.0, 1.0, 4.0])
