"""Small programs drawn at random: the density is NumPyro's, and J = β·log Z − β·KL(q‖p*)."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from hypothesis import given
from hypothesis import strategies as st
from jax import Array
from numpyro.infer.util import log_density as numpyro_log_density

import bayesrl
from bayesrl.core.density import Density
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.objectives import ReverseKL


@dataclass(frozen=True)
class Program:
    """Discrete sites, each seeing some earlier ones, perhaps in a plate of contexts, each perhaps rewarded."""

    sizes: tuple[int, ...]
    sees: tuple[tuple[bool, ...], ...]
    rewarded: tuple[bool, ...]
    plate: int | None
    beta: float
    seed: int

    def table(self, role: int, site: int, width: int) -> np.ndarray:
        """Numbers [contexts, earlier assignment, width] that repeat where an earlier site is not seen."""
        rng = np.random.default_rng((self.seed, role, site))
        full = rng.normal(size=(self.plate or 1, *self.sizes[:site], width))
        for earlier, seen in enumerate(self.sees[site][:site]):
            if not seen:
                full = np.broadcast_to(full.take([0], axis=1 + earlier), full.shape)
        return np.asarray(full, np.float32)

    def run(self, role: int, *, rewards: bool) -> None:
        def body(context: Array) -> None:
            drawn: list[Array] = []
            for i, size in enumerate(self.sizes):
                logits = jnp.asarray(self.table(role, i, size))[(context, *drawn)]
                drawn.append(numpyro.sample(f"x{i}", dist.Categorical(logits=logits)))
                if rewards and self.rewarded[i]:
                    bayesrl.reward(f"r{i}", jnp.asarray(self.table(9, i, size))[(context, *drawn)])
            if rewards:
                bayesrl.reward("last", 0.5 * drawn[-1])

        if self.plate is None:
            body(jnp.array(0))
        else:
            with numpyro.plate("context", self.plate) as context:
                body(context)

    def policy(self) -> None:
        self.run(0, rewards=True)

    def guide(self) -> None:
        self.run(1, rewards=False)

    def truth(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log prior, log q and reward of every assignment, [contexts, assignments]."""

        def normalised(role: int, i: int) -> Any:
            x = self.table(role, i, self.sizes[i]).astype(float)
            return x - np.log(np.exp(x).sum(-1, keepdims=True))

        shape = (self.plate or 1, int(np.prod(self.sizes)))
        prior, q, reward = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for n, xs in enumerate(product(*map(range, self.sizes))):
            for i, x in enumerate(xs):
                where = (slice(None), *xs[:i], x)
                prior[:, n] += normalised(0, i)[where]
                q[:, n] += normalised(1, i)[where]
                if self.rewarded[i]:
                    reward[:, n] += self.table(9, i, self.sizes[i])[where]
            reward[:, n] += 0.5 * xs[-1]
        return prior, q, reward


@st.composite
def programs(draw: Any) -> Program:
    num = draw(st.integers(1, 3))
    flags = st.tuples(*[st.booleans()] * num)
    return Program(
        sizes=draw(st.tuples(*[st.integers(2, 3)] * num)),
        sees=draw(st.tuples(*[flags] * num)),
        rewarded=draw(flags),
        plate=draw(st.sampled_from([None, 1, 3])),
        beta=draw(st.sampled_from([0.3, 1.0, 4.0])),
        seed=draw(st.integers(0, 1000)),
    )


@given(programs())
def test_density_and_objective(program: Program) -> None:
    prior, q, reward = program.truth()
    shape = () if program.plate is None else (program.plate,)
    structure = inspect(jax.random.key(0), program.policy)
    assert structure.context_shape == shape
    grid = np.array(list(product(*map(range, program.sizes))))
    sites = {
        f"x{i}": jnp.broadcast_to(jnp.asarray(grid[:, i]).reshape(-1, *(1,) * len(shape)), (len(grid), *shape))
        for i in range(len(program.sizes))
    }

    @jax.jit
    def score(sites: dict[str, Array]) -> tuple[Density, Array]:
        def one(values: dict[str, Array]) -> tuple[Density, Array]:
            reference, _ = numpyro_log_density(bayesrl.tilt(program.policy, program.beta), (), {}, values)
            return bayesrl.log_density(program.policy, values, beta=program.beta), reference

        return jax.vmap(one)(sites)

    density, reference = score(sites)
    contexts = lambda x: np.asarray(x).reshape(len(grid), -1).T  # noqa: E731
    assert np.allclose(contexts(density.log_prior), prior, atol=1e-4)
    assert np.allclose(contexts(density.total_reward), reward, atol=1e-4)
    assert np.allclose(contexts(density.log_target), prior + reward / program.beta, rtol=1e-4, atol=1e-4)
    assert np.allclose(contexts(density.log_target).sum(0), reference, rtol=1e-4, atol=1e-4)

    bound = Programs(program.policy, program.guide, structure, (), {})
    ready = ReverseKL(64, enumerated=structure.actions).prepare(jax.random.key(0), bound, {})
    _, info = jax.jit(lambda key: ready.evaluate(key, {}, bound, program.beta))(jax.random.key(1))
    log_joint = prior + reward / program.beta
    log_z = np.log(np.exp(log_joint).sum(-1, keepdims=True))
    kl_to_posterior = (np.exp(q) * (q - log_joint + log_z)).sum(-1).mean()
    expected = program.beta * (log_z.mean() - kl_to_posterior)
    assert np.isclose(float(info.objective), expected, rtol=1e-4, atol=1e-4)
    assert np.isclose(float(info.reward), (np.exp(q) * reward).sum(-1).mean(), rtol=1e-4, atol=1e-4)
    assert np.isclose(float(info.kl), (np.exp(q) * (q - prior)).sum(-1).mean(), rtol=1e-4, atol=1e-4)
