"""The hypergrid of GFlowNets: walks from a corner, whose posterior over end points is the law of the reward."""

import itertools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.contrib.control_flow import scan

import bayesrl
from bayesrl.errors import PolicyError
from bayesrl.guides import PolicyGuide
from bayesrl.objectives import TrajectoryBalance

MOST_CELLS = 100_000


def problem(
    *,
    dimensions: int = 2,
    height: int = 8,
    r0: float = 0.1,
    r1: float = 0.5,
    r2: float = 2.0,
    beta: float = 1.0,
    steps: int = 2000,
    particles: int = 64,
) -> bayesrl.Problem:
    """Make the problem of Bengio, Jain, Korablyov, Precup & Bengio (2021), section 4.1.

    A walk starts at the corner 0, and each action adds 1 to one coordinate or stops at x. The prior draws x uniformly,
    and then one of the ways to x by steps back, each uniform over the coordinates above 0 (`uniform_walks`). The reward
    is log R(x). So a walk τ to x has the posterior density ∝ π₀(τ)·R(x)^(1/β) ∝ P_B(τ|x)·R(x)^(1/β): however many walks
    lead to x, its probability is R(x)^(1/β) / ΣR^(1/β).

    Args:
        dimensions: number of coordinates.
        height: values of each coordinate.
        r0: R everywhere, above 0.
        r1: what R gains where every coordinate is in an outer quarter.
        r2: what R gains where every coordinate is also in a ring inside of that quarter.
        beta: default temperature; at 1 the end points have the law of R itself.
        steps: gradient steps.
        particles: walks per step.

    Raises:
        PolicyError: r0 is not above 0, a gain is negative, or there are no cells or too many.
    """
    sizes = (int(dimensions), int(height))
    if min(sizes) < 1 or sizes[1] < 2 or sizes[1] ** sizes[0] > MOST_CELLS:
        raise PolicyError(
            f"dimensions={dimensions} and height={height} make no grid of 2 to {MOST_CELLS:,} cells; use fewer, such "
            "as dimensions=2 and height=8"
        )
    if not (r0 > 0 and r1 >= 0 and r2 >= 0):
        raise PolicyError(f"r0={r0}, r1={r1}, r2={r2}: log R needs r0 above 0, and gains of at least 0; use r0=0.1")
    log_reward = np.log(rewards(*sizes, r0, r1, r2))
    walk = Walk(log_reward, uniform_walks(*sizes))

    def optimum(beta: float) -> float:
        tempered = log_reward / beta
        return float(beta * (np.log(np.mean(np.exp(tempered - tempered.max()))) + tempered.max()))

    fit_options = {
        "guide": PolicyGuide(walk.tilted, within_prior=True),
        "objective": TrajectoryBalance(num_particles=int(particles)),
        "learning_rate": 0.1,
        "num_steps": int(steps),
    }
    about = f"walks on a grid of {len(log_reward):,} cells, whose ends have the law of the reward"
    return bayesrl.Problem(walk, beta=beta, fit_options=fit_options, optimum=optimum, about=about)


def cells(dimensions: int, height: int) -> np.ndarray:
    """List the cells, [height ** dimensions, dimensions], the last coordinate fastest."""
    return np.array(list(itertools.product(range(height), repeat=dimensions)))


def rewards(dimensions: int, height: int, r0: float, r1: float, r2: float) -> np.ndarray:
    """Compute R of all cells: r0 + r1·[all |x/(H−1) − ½| > ¼] + r2·[all of them between 0.3 and 0.4]."""
    far = np.abs(cells(dimensions, height) / (height - 1) - 0.5)
    values: np.ndarray = r0 + r1 * (far > 0.25).all(-1) + r2 * ((far > 0.3) & (far < 0.4)).all(-1)
    return values


def uniform_walks(dimensions: int, height: int) -> np.ndarray:
    """Compute the policy whose walks end uniformly, and came back by uniform steps: log-probabilities [cells, actions].

    A cell passes its flow on: 1 to those that end there, and to each next cell the share of that cell's flow that goes
    back this way, F(s) = 1 + Σ F(s')/#{coordinates of s' above 0}. Action d adds 1 to coordinate d; the last one stops.
    """
    grid = cells(dimensions, height)
    strides = height ** np.arange(dimensions - 1, -1, -1)
    flow = np.ones(len(grid))
    moves = np.zeros((len(grid), dimensions + 1))
    for index in sorted(range(len(grid)), key=lambda i: -grid[i].sum()):
        moves[index, -1] = 1.0
        for d in range(dimensions):
            if grid[index, d] < height - 1:
                after = index + strides[d]
                moves[index, d] = flow[after] / (grid[after] > 0).sum()
        flow[index] = moves[index].sum()
    with np.errstate(divide="ignore"):
        found: np.ndarray = np.log(moves / flow[:, None])
    return found


class Walk:
    """The program of a walk, and its guide, which adds a table [cells, actions] to the logits of the prior."""

    def __init__(self, log_reward: np.ndarray, log_prior: np.ndarray) -> None:
        self.dimensions = log_prior.shape[1] - 1
        self.height = round(len(log_reward) ** (1 / self.dimensions))
        self.strides = jnp.asarray(self.height ** np.arange(self.dimensions - 1, -1, -1))
        self.logits, self.gain = jnp.asarray(log_prior, float), jnp.asarray(log_reward, float)

    def __call__(self) -> None:
        """Run the policy."""
        self.run(self.logits)

    def tilted(self) -> None:
        """Run the guide."""
        self.run(self.logits + numpyro.param("table", jnp.zeros(self.logits.shape)))

    def run(self, logits: Array) -> None:
        """Walk with these log-probabilities of actions, [cells, actions]."""

        def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            cell, walking = carry
            # Who has stopped, stops again: this has probability 1.
            action = numpyro.sample(
                "action", dist.Categorical(logits=jnp.where(walking, logits[cell], self.logits[-1]))
            )
            stops = action == self.dimensions
            bayesrl.reward("log_reward", jnp.where(walking & stops, self.gain[cell], 0.0))
            walking = walking & ~stops
            moved = cell + jnp.append(self.strides, 0)[action]
            return (jnp.where(walking, moved, cell), walking), None

        longest = self.dimensions * (self.height - 1) + 1
        (cell, _), _ = scan(step, (jnp.asarray(0), jnp.asarray(True)), None, length=longest)
        numpyro.deterministic("end", cell // self.strides % self.height)
