"""Problems with known answers: a policy, a guide, and the exact objective as a function of the guide's parameters.

The truth is written out by hand here (enumeration in NumPy and jnp, soft dynamic programming,
quadrature, Gaussian closed forms); nothing of it is computed by the library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.scipy.stats import norm
from numpy.polynomial.hermite_e import hermegauss
from numpyro.contrib.control_flow import scan

import bayesrl
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.objectives.base import Info, Objective
from bayesrl.posterior.policy_and_guide import bind_programs
from bayesrl.posterior.posterior import Posterior

type Params = dict[str, Any]


@dataclass(frozen=True)
class Oracle:
    """A problem and the truth about it.

    Attributes:
        policy: the program.
        guide: written by hand; all its parameters are unconstrained.
        params: a point of the guide away from the prior and from the optimum.
        beta: temperature, reward units per nat.
        objective: exact J per context (reward units) at parameters; differentiable.
        optimum: J*, reward units.
        log_evidence: log Z per context, nats; None where nature plays, since J* is not β·log Z then.
        best: parameters at which q = p*; None where the family does not hold p*.
        forward: exact KL(p*‖q) per context, nats, at parameters; differentiable.
        tail: sites that may be enumerated, the last of the program.
        args: arguments of both programs.
    """

    policy: Callable[..., Any]
    guide: Callable[..., Any]
    params: Params
    beta: float
    objective: Callable[[Params], Array]
    optimum: float
    log_evidence: float | None = None
    best: Params | None = None
    forward: Callable[[Params], Array] | None = None
    tail: tuple[str, ...] = ()
    args: tuple[Any, ...] = ()

    def value(self, params: Params) -> float:
        """Exact J at parameters, by one program and not by one for each operation."""
        return float(jax.jit(self.objective)(jax.tree.map(jnp.asarray, params)))


class Still(Objective):
    """Leaves parameters where they are: a fit by it compiles next to nothing."""

    def prepare(self, key: Array, programs: Programs, params: Params) -> Objective:
        return self

    def draw(self, key: Array, params: Params, programs: Programs) -> Draws:
        raise NotImplementedError

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        raise NotImplementedError

    def evaluate(self, key: Array, params: Params, programs: Programs, beta: Any) -> tuple[Array, Info]:
        zero = jnp.zeros(())
        return sum((0.0 * x.sum() for x in jax.tree.leaves(params)), zero), Info(zero, zero, zero, zero, {}, {})


def standing(key: Array, oracle: Oracle, params: Params | None = None) -> Posterior:
    """A posterior whose guide stands at given parameters, the problem's own by default, without a fit and without draws."""
    programs = bind_programs(key, oracle.policy, oracle.args, oracle.beta, oracle.guide).programs
    given = oracle.params if params is None else params
    return Posterior(
        beta=oracle.beta,
        params={name: np.asarray(value, np.float32)[None] for name, value in given.items()},
        history={"loss": np.zeros((0, 1)), "step": np.zeros(0, int)},
        draws={},
        statistics={},
        prior_draws={},
        settings={},
        programs=programs,
    )


ORACLES: dict[str, Callable[[], Oracle]] = {}


def register(make: Callable[[], Oracle]) -> Callable[[], Oracle]:
    cached = cache(make)
    ORACLES[make.__name__] = cached
    return cached


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Fixed numbers of size about 1."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, float)
    return x - logsumexp(x, -1)[..., None]


def logsumexp(x: np.ndarray, axis: int | None = None) -> Any:
    top = x.max(axis, keepdims=True)
    return (np.log(np.exp(x - top).sum(axis, keepdims=True)) + top).squeeze(axis)


def from_table(
    log_q: Callable[[Params], Array], log_prior: np.ndarray, reward: np.ndarray, beta: float
) -> dict[str, Any]:
    """Give the truth of a problem from tables over all assignments, [*contexts, assignments]."""
    log_prior, reward = np.asarray(log_prior, float), np.asarray(reward, float)
    log_joint = log_prior + reward / beta
    log_z = logsumexp(log_joint, -1)
    log_post = log_joint - log_z[..., None]

    def objective(params: Params) -> Array:
        lq = log_q(params)
        return (jnp.exp(lq) * (reward - beta * (lq - log_prior))).sum(-1).mean()

    def forward(params: Params) -> Array:
        return (np.exp(log_post) * (log_post - log_q(params))).sum(-1).mean()

    return {
        "beta": beta,
        "objective": objective,
        "forward": forward,
        "optimum": float(beta * log_z.mean()),
        "log_evidence": float(log_z.mean()),
    }


@register
def flat() -> Oracle:
    """One choice among five."""
    prior, means = log_softmax(numbers(0, 5)), numbers(1, 5)
    beta = 0.5

    def policy() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.asarray(prior)))
        bayesrl.reward("payoff", jnp.asarray(means)[arm])

    def guide() -> None:
        numpyro.sample("arm", dist.Categorical(logits=numpyro.param("arm_logits", jnp.asarray(prior))))

    return Oracle(
        policy,
        guide,
        {"arm_logits": numbers(2, 5)},
        best={"arm_logits": prior + means / beta},
        tail=("arm",),
        **from_table(lambda p: jax.nn.log_softmax(p["arm_logits"]), prior, means, beta),
    )


@register
def dependent() -> Oracle:
    """Two choices, the second seeing the first; rewards between and after them."""
    prior_a, prior_b = log_softmax(numbers(3, 3)), log_softmax(numbers(4, 3, 2))
    first, second = numbers(5, 3), numbers(6, 3, 2)
    beta = 0.7

    def policy() -> None:
        a = numpyro.sample("a", dist.Categorical(logits=jnp.asarray(prior_a)))
        bayesrl.reward("first", jnp.asarray(first)[a])
        b = numpyro.sample("b", dist.Categorical(logits=jnp.asarray(prior_b)[a]))
        bayesrl.reward("second", jnp.asarray(second)[a, b])

    def guide() -> None:
        logits_a = numpyro.param("a_logits", jnp.asarray(prior_a))
        logits_b = numpyro.param("b_logits", jnp.asarray(prior_b))
        a = numpyro.sample("a", dist.Categorical(logits=logits_a))
        numpyro.sample("b", dist.Categorical(logits=logits_b[a]))

    def log_q(p: Params) -> Array:
        return (jax.nn.log_softmax(p["a_logits"])[:, None] + jax.nn.log_softmax(p["b_logits"])).reshape(-1)

    log_joint = (first[:, None] + second) / beta + prior_a[:, None] + prior_b
    return Oracle(
        policy,
        guide,
        {"a_logits": numbers(7, 3), "b_logits": numbers(8, 3, 2)},
        best={"a_logits": logsumexp(log_joint, -1), "b_logits": log_joint},
        tail=("b",),
        **from_table(log_q, (prior_a[:, None] + prior_b).reshape(-1), (first[:, None] + second).reshape(-1), beta),
    )


def soft_values(
    prior: np.ndarray, rewards: np.ndarray, transition: np.ndarray, beta: float, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Soft backward induction: V_0 [states] and the optimal log-policy [steps, states, actions]."""
    value, policies = np.zeros(rewards.shape[0]), []
    for _ in range(steps):
        q = prior + (rewards + transition @ value) / beta
        value = beta * logsumexp(q, -1)
        policies.append(log_softmax(q))
    return value, np.stack(policies[::-1])


def chain_objective(
    prior: np.ndarray, rewards: np.ndarray, transition: np.ndarray, beta: float
) -> Callable[[Params], Array]:
    def objective(params: Params) -> Array:
        value = jnp.zeros(rewards.shape[0])
        for logits in params["table"][::-1]:
            log_q = jax.nn.log_softmax(logits)
            value = (jnp.exp(log_q) * (rewards + transition @ value - beta * (log_q - prior))).sum(-1)
        return value[0]

    return objective


@register
def chain() -> Oracle:
    """Four steps on three states, moved by the action alone."""
    steps, beta = 4, 0.6
    prior, rewards = log_softmax(numbers(9, 3, 2)), numbers(10, 3, 2)
    following = np.array([[0, 1], [2, 0], [1, 2]])
    transition = np.eye(3)[following]

    def policy() -> None:
        def step(state: Array, _: Any) -> tuple[Array, None]:
            action = numpyro.sample("action", dist.Categorical(logits=jnp.asarray(prior)[state]))
            bayesrl.reward("gain", jnp.asarray(rewards)[state, action])
            return jnp.asarray(following)[state, action], None

        scan(step, jnp.array(0), jnp.arange(steps))

    def guide() -> None:
        table = numpyro.param("table", jnp.broadcast_to(jnp.asarray(prior), (steps, 3, 2)))

        def step(state: Array, logits: Array) -> tuple[Array, None]:
            action = numpyro.sample("action", dist.Categorical(logits=logits[state]))
            return jnp.asarray(following)[state, action], None

        scan(step, jnp.array(0), table)

    value, best = soft_values(prior, rewards, transition, beta, steps)
    return Oracle(
        policy,
        guide,
        {"table": numbers(11, steps, 3, 2)},
        beta,
        chain_objective(prior, rewards, transition, beta),
        float(value[0]),
        float(value[0]) / beta,
        {"table": best},
    )


@register
def chain_with_nature() -> Oracle:
    """Four steps on three states, moved by nature, whom the agent sees."""
    steps, beta = 4, 0.4
    prior, rewards = log_softmax(numbers(12, 3, 2)), numbers(13, 3, 2)
    transition = np.exp(log_softmax(numbers(14, 3, 2, 3)))

    def nature(state: Array, action: Array) -> Array:
        return bayesrl.environment(
            "state", dist.Categorical(probs=jnp.asarray(transition)[state, action]), observable=True
        )

    def policy() -> None:
        def step(state: Array, _: Any) -> tuple[Array, None]:
            action = numpyro.sample("action", dist.Categorical(logits=jnp.asarray(prior)[state]))
            bayesrl.reward("gain", jnp.asarray(rewards)[state, action])
            return nature(state, action), None

        scan(step, jnp.array(0), jnp.arange(steps))

    def guide() -> None:
        table = numpyro.param("table", jnp.broadcast_to(jnp.asarray(prior), (steps, 3, 2)))

        def step(state: Array, logits: Array) -> tuple[Array, None]:
            action = numpyro.sample("action", dist.Categorical(logits=logits[state]))
            return nature(state, action), None

        scan(step, jnp.array(0), table)

    value, best = soft_values(prior, rewards, transition, beta, steps)
    return Oracle(
        policy,
        guide,
        {"table": numbers(15, steps, 3, 2)},
        beta,
        chain_objective(prior, rewards, transition, beta),
        float(value[0]),
        best={"table": best},
    )


@register
def episode() -> Oracle:
    """A choice, three steps that see it, and one reward at the end."""
    beta = 0.5
    prior_z, prior_x = log_softmax(numbers(16, 2)), log_softmax(numbers(17, 2, 2))
    during, after = numbers(18, 2, 2), numbers(19, 2, 4)

    def policy() -> None:
        z = numpyro.sample("z", dist.Categorical(logits=jnp.asarray(prior_z)))

        def step(count: Array, _: Any) -> tuple[Array, None]:
            x = numpyro.sample("x", dist.Categorical(logits=jnp.asarray(prior_x)[z]))
            bayesrl.reward("during", jnp.asarray(during)[z, x])
            return count + x, None

        count, _ = scan(step, jnp.array(0), jnp.arange(3))
        bayesrl.reward("after", jnp.asarray(after)[z, count])

    def guide() -> None:
        z = numpyro.sample("z", dist.Categorical(logits=numpyro.param("z_logits", jnp.asarray(prior_z))))
        table = numpyro.param("x_logits", jnp.broadcast_to(jnp.asarray(prior_x)[:, None], (3, 2, 3, 2)))

        def step(count: Array, logits: Array) -> tuple[Array, None]:
            x = numpyro.sample("x", dist.Categorical(logits=logits[z, count]))
            return count + x, None

        scan(step, jnp.array(0), table)

    paths = list(product((0, 1), repeat=4))

    def log_q(p: Params) -> Array:
        log_z, log_x = jax.nn.log_softmax(p["z_logits"]), jax.nn.log_softmax(p["x_logits"])
        return jnp.stack([log_z[z] + sum(log_x[t, z, sum(xs[:t]), xs[t]] for t in range(3)) for z, *xs in paths])

    log_prior = np.array([prior_z[z] + sum(prior_x[z, x] for x in xs) for z, *xs in paths])
    reward = np.array([sum(during[z, x] for x in xs) + after[z, sum(xs)] for z, *xs in paths])
    params = {"z_logits": numbers(20, 2), "x_logits": numbers(21, 3, 2, 3, 2)}
    return Oracle(policy, guide, params, **from_table(log_q, log_prior, reward, beta))


@register
def contexts() -> Oracle:
    """Four separate problems side by side; data come as arguments."""
    beta, payoffs = 0.5, numbers(22, 4, 3)
    prior = log_softmax(numbers(23, 3))

    def policy(payoffs: Array) -> None:
        with numpyro.plate("context", 4):
            arm = numpyro.sample("arm", dist.Categorical(logits=jnp.asarray(prior)))
            bayesrl.reward("payoff", payoffs[jnp.arange(4), arm])

    def guide(payoffs: Array) -> None:
        logits = numpyro.param("table", jnp.broadcast_to(jnp.asarray(prior), (4, 3)))
        with numpyro.plate("context", 4):
            numpyro.sample("arm", dist.Categorical(logits=logits))

    return Oracle(
        policy,
        guide,
        {"table": numbers(24, 4, 3)},
        best={"table": prior + payoffs / beta},
        tail=("arm",),
        args=(payoffs,),
        **from_table(lambda p: jax.nn.log_softmax(p["table"]), np.broadcast_to(prior, (4, 3)), payoffs, beta),
    )


@register
def subsampled() -> Oracle:
    """Six separate problems, of which every step sees two."""
    beta, payoffs = 0.5, numbers(25, 6, 3)
    prior = log_softmax(numbers(26, 3))

    def policy(payoffs: Array) -> None:
        with numpyro.plate("context", 6, subsample_size=2) as i:
            arm = numpyro.sample("arm", dist.Categorical(logits=jnp.asarray(prior)))
            bayesrl.reward("payoff", payoffs[i, arm])

    def guide(payoffs: Array) -> None:
        logits = numpyro.param("table", jnp.broadcast_to(jnp.asarray(prior), (6, 3)))
        with numpyro.plate("context", 6, subsample_size=2) as i:
            numpyro.sample("arm", dist.Categorical(logits=logits[i]))

    return Oracle(
        policy,
        guide,
        {"table": numbers(27, 6, 3)},
        best={"table": prior + payoffs / beta},
        tail=("arm",),
        args=(payoffs,),
        **from_table(lambda p: jax.nn.log_softmax(p["table"]), np.broadcast_to(prior, (6, 3)), payoffs, beta),
    )


@register
def nested() -> Oracle:
    """Three contexts, each with two bits that are rewarded together."""
    beta, by_count = 0.8, numbers(28, 3, 3)

    def policy() -> None:
        with numpyro.plate("context", 3, dim=-2):
            with numpyro.plate("bit", 2, dim=-1):
                bits = numpyro.sample("bits", dist.Bernoulli(0.4))
            count = bits.sum(-1)
            bayesrl.reward("payoff", jnp.asarray(by_count)[jnp.arange(3), count][:, None])

    def guide() -> None:
        logits = numpyro.param("table", jnp.zeros((3, 2)))
        with numpyro.plate("context", 3, dim=-2), numpyro.plate("bit", 2, dim=-1):
            numpyro.sample("bits", dist.Bernoulli(logits=logits))

    pairs = np.array(list(product((0, 1), repeat=2)))

    def log_q(p: Params) -> Array:
        signs = 2 * pairs - 1
        return jax.nn.log_sigmoid(signs * p["table"][:, None, :]).sum(-1)

    log_prior = np.broadcast_to(np.log(np.where(pairs, 0.4, 0.6)).sum(-1), (3, 4))
    reward = by_count[:, pairs.sum(-1)]
    return Oracle(policy, guide, {"table": numbers(29, 3, 2)}, **from_table(log_q, log_prior, reward, beta))


@register
def interacting() -> Oracle:
    """Three bits in a plate, rewarded together: one problem, not three."""
    beta, by_count = 0.8, numbers(30, 4)

    def policy() -> None:
        with numpyro.plate("bit", 3):
            bits = numpyro.sample("bits", dist.Bernoulli(0.4))
        bayesrl.reward("payoff", jnp.asarray(by_count)[bits.sum()])

    def guide() -> None:
        logits = numpyro.param("table", jnp.zeros(3))
        with numpyro.plate("bit", 3):
            numpyro.sample("bits", dist.Bernoulli(logits=logits))

    triples = np.array(list(product((0, 1), repeat=3)))

    def log_q(p: Params) -> Array:
        return jax.nn.log_sigmoid((2 * triples - 1) * p["table"]).sum(-1)

    log_prior = np.log(np.where(triples, 0.4, 0.6)).sum(-1)
    truth = from_table(log_q, log_prior, by_count[triples.sum(-1)], beta)
    return Oracle(policy, guide, {"table": numbers(31, 3)}, **truth)


@register
def observable() -> Oracle:
    """Nature speaks first and is seen."""
    beta, chance = 0.5, np.array([0.3, 0.7])
    prior, payoffs = log_softmax(numbers(32, 2, 3)), numbers(33, 2, 3)

    def policy() -> None:
        w = bayesrl.environment("w", dist.Categorical(probs=jnp.asarray(chance)), observable=True)
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.asarray(prior)[w]))
        bayesrl.reward("payoff", jnp.asarray(payoffs)[w, arm])

    def guide() -> None:
        logits = numpyro.param("table", jnp.asarray(prior))
        w = bayesrl.environment("w", dist.Categorical(probs=jnp.asarray(chance)), observable=True)
        numpyro.sample("arm", dist.Categorical(logits=logits[w]))

    def objective(p: Params) -> Array:
        log_q = jax.nn.log_softmax(p["table"])
        return chance @ (jnp.exp(log_q) * (payoffs - beta * (log_q - prior))).sum(-1)

    best = prior + payoffs / beta
    return Oracle(
        policy,
        guide,
        {"table": numbers(34, 2, 3)},
        beta,
        objective,
        float(chance @ (beta * logsumexp(best, -1))),
        best={"table": best},
        tail=("arm",),
    )


@register
def hidden() -> Oracle:
    """Nature answers the choice, unseen; the guide leaves her out."""
    beta = 0.5
    prior, payoffs = log_softmax(numbers(35, 3)), numbers(36, 3, 2)
    chance = np.array([0.2, 0.6, 0.9])
    expected = (1 - chance) * payoffs[:, 0] + chance * payoffs[:, 1]

    def policy() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.asarray(prior)))
        h = bayesrl.environment("h", dist.Bernoulli(jnp.asarray(chance)[arm]), observable=False)
        bayesrl.reward("payoff", jnp.asarray(payoffs)[arm, h])

    def guide() -> None:
        numpyro.sample("arm", dist.Categorical(logits=numpyro.param("logits", jnp.asarray(prior))))

    truth = from_table(lambda p: jax.nn.log_softmax(p["logits"]), prior, expected, beta)
    return Oracle(
        policy,
        guide,
        {"logits": numbers(37, 3)},
        beta,
        truth["objective"],
        truth["optimum"],
        best={"logits": prior + expected / beta},
    )


@register
def weathers() -> Oracle:
    """Three contexts, each with its own weather, which the agent sees."""
    beta, chance = 0.5, np.array([0.2, 0.5, 0.7])
    prior, payoffs = log_softmax(numbers(38, 2)), numbers(39, 3, 2, 2)

    def nature() -> Array:
        return bayesrl.environment("w", dist.Bernoulli(jnp.asarray(chance)), observable=True)

    def policy() -> None:
        with numpyro.plate("context", 3) as i:
            w = nature()
            arm = numpyro.sample("arm", dist.Categorical(logits=jnp.asarray(prior)))
            bayesrl.reward("payoff", jnp.asarray(payoffs)[i, w, arm])

    def guide() -> None:
        logits = numpyro.param("table", jnp.zeros((3, 2, 2)))
        with numpyro.plate("context", 3) as i:
            numpyro.sample("arm", dist.Categorical(logits=logits[i, nature()]))

    weights = np.stack([1 - chance, chance], -1)

    def objective(p: Params) -> Array:
        log_q = jax.nn.log_softmax(p["table"])
        return (weights * (jnp.exp(log_q) * (payoffs - beta * (log_q - prior))).sum(-1)).sum(-1).mean()

    best = prior + payoffs / beta
    optimum = float((weights * beta * logsumexp(best, -1)).sum(-1).mean())
    return Oracle(policy, guide, {"table": numbers(40, 3, 2, 2)}, beta, objective, optimum, best={"table": best})


@register
def observed() -> Oracle:
    """Rewards and data in one program: π₀ means p(x|y)."""
    beta, data = 0.5, 0.4
    prior, payoffs, centres = log_softmax(numbers(41, 3)), numbers(42, 3), numbers(43, 3)

    def policy(y: Array) -> None:
        x = numpyro.sample("x", dist.Categorical(logits=jnp.asarray(prior)))
        numpyro.sample("y", dist.Normal(jnp.asarray(centres)[x], 0.5), obs=y)
        bayesrl.reward("payoff", jnp.asarray(payoffs)[x])

    def guide(y: Array) -> None:
        numpyro.sample("x", dist.Categorical(logits=numpyro.param("logits", jnp.zeros(3))))

    log_joint = prior - 0.5 * ((data - centres) / 0.5) ** 2 - np.log(0.5) - 0.5 * np.log(2 * np.pi)
    truth = from_table(lambda p: jax.nn.log_softmax(p["logits"]), log_joint, payoffs, beta)
    return Oracle(
        policy,
        guide,
        {"logits": numbers(44, 3)},
        best={"logits": log_joint + payoffs / beta},
        tail=("x",),
        args=(np.float32(data),),
        **truth,
    )


def normal_kl(mean: Any, scale: Any) -> Array:
    """KL(N(mean, scale²) ‖ N(0, 1))."""
    return 0.5 * (mean**2 + scale**2 - 1) - jnp.log(scale)


@register
def gaussian() -> Oracle:
    """A point in the plane, rewarded for being near a target."""
    beta, curvature, target = 0.5, 1.5, np.array([0.7, -0.4])

    def policy() -> None:
        x = numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        bayesrl.reward("near", -0.5 * curvature * ((x - jnp.asarray(target)) ** 2).sum())

    def guide() -> None:
        mean, log_scale = numpyro.param("mean", jnp.zeros(2)), numpyro.param("log_scale", jnp.zeros(2))
        numpyro.sample("x", dist.Normal(mean, jnp.exp(log_scale)).to_event(1))

    precision = 1 + curvature / beta
    best = (curvature / beta) * target / precision

    def objective(p: Params) -> Array:
        m, s = p["mean"], jnp.exp(p["log_scale"])
        return (-0.5 * curvature * ((m - target) ** 2 + s**2) - beta * normal_kl(m, s)).sum()

    def forward(p: Params) -> Array:
        m, s = p["mean"], jnp.exp(p["log_scale"])
        return (jnp.log(s) + 0.5 * np.log(precision) + 0.5 * ((best - m) ** 2 + 1 / precision) / s**2 - 0.5).sum()

    log_z = float((-0.5 * np.log(precision) - 0.5 * (curvature / beta) / precision * target**2).sum())
    return Oracle(
        policy,
        guide,
        {"mean": numbers(45, 2), "log_scale": 0.5 * numbers(46, 2)},
        beta,
        objective,
        beta * log_z,
        log_z,
        {"mean": best, "log_scale": np.full(2, -0.5 * np.log(precision))},
        forward,
    )


@register
def walk() -> Oracle:
    """Three Gaussian moves in a scan, each seeing where it stands."""
    beta, steps = 0.5, 3

    def policy() -> None:
        def step(place: Array, _: Any) -> tuple[Array, None]:
            place = place + numpyro.sample("move", dist.Normal(0.0, 1.0))
            bayesrl.reward("near", -0.5 * (place - 1.0) ** 2)
            return place, None

        scan(step, jnp.array(0.0), jnp.arange(steps))

    def guide() -> None:
        table = numpyro.param("table", jnp.zeros((steps, 3)))

        def step(place: Array, row: Array) -> tuple[Array, None]:
            move = numpyro.sample("move", dist.Normal(row[0] + row[1] * place, jnp.exp(row[2])))
            return place + move, None

        scan(step, jnp.array(0.0), table)

    def objective(p: Params) -> Array:
        mean = variance = total = 0.0
        for shift, slope, log_scale in p["table"]:
            scale = jnp.exp(log_scale)
            drift = shift + slope * mean
            total = total - beta * (normal_kl(drift, scale) + 0.5 * slope**2 * variance)
            mean, variance = mean + drift, (1 + slope) ** 2 * variance + scale**2
            total = total - 0.5 * ((mean - 1.0) ** 2 + variance)
        return jnp.asarray(total)

    below = np.tril(np.ones((steps, steps)))
    precision, pull = np.eye(steps) + below.T @ below / beta, below.T @ np.ones(steps) / beta
    log_z = -0.5 * np.linalg.slogdet(precision)[1] - 0.5 * (steps / beta - pull @ np.linalg.solve(precision, pull))
    params = {"table": 0.4 * numbers(47, steps, 3)}
    return Oracle(policy, guide, params, beta, objective, float(beta * log_z), float(log_z))


def nodes() -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of an expectation over N(0, 1)."""
    x, w = hermegauss(60)
    return x, w / w.sum()


@register
def mixed() -> Oracle:
    """A bit, a number whose mean it sets, and a bit whose odds the number sets; all are rewarded."""
    beta, centre = 0.7, np.array([-0.5, 0.8])

    def payoff(z: Any, x: Any, b: Any) -> Any:
        return 0.8 * b - 0.3 * (x - z) ** 2 + 0.4 * z * b

    def policy() -> None:
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        x = numpyro.sample("x", dist.Normal(jnp.asarray(centre)[z], 1.0))
        b = numpyro.sample("b", dist.Bernoulli(logits=x))
        bayesrl.reward("payoff", payoff(z, x, b))

    def guide() -> None:
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("z_logit", jnp.array(0.0))))
        mean, log_scale = numpyro.param("mean", jnp.zeros(2)), numpyro.param("log_scale", jnp.zeros(2))
        x = numpyro.sample("x", dist.Normal(mean[z], jnp.exp(log_scale[z])))
        shift, slope = numpyro.param("b_shift", jnp.array(0.0)), numpyro.param("b_slope", jnp.array(1.0))
        numpyro.sample("b", dist.Bernoulli(logits=shift + slope * x))

    points, weights = nodes()

    def objective(p: Params) -> Array:
        total = jnp.array(0.0)
        for z, log_qz in ((0, jax.nn.log_sigmoid(-p["z_logit"])), (1, jax.nn.log_sigmoid(p["z_logit"]))):
            scale = jnp.exp(p["log_scale"][z])
            x = p["mean"][z] + scale * points
            ratio = log_qz - np.log((0.6, 0.4)[z]) + norm.logpdf(x, p["mean"][z], scale) - norm.logpdf(x, centre[z])
            logit = p["b_shift"] + p["b_slope"] * x
            for b, sign in ((0, -1), (1, 1)):
                log_qb = jax.nn.log_sigmoid(sign * logit)
                value = payoff(z, x, b) - beta * (ratio + log_qb - jax.nn.log_sigmoid(sign * x))
                total = total + jnp.exp(log_qz) * (weights * jnp.exp(log_qb) * value).sum()
        return total

    grid = np.linspace(-9, 9, 20001)
    evidence = 0.0
    for z, chance in ((0, 0.6), (1, 0.4)):
        density = np.exp(-0.5 * (grid - centre[z]) ** 2) / np.sqrt(2 * np.pi)
        for b, sign in ((0, -1), (1, 1)):
            inside = density / (1 + np.exp(-sign * grid)) * np.exp(payoff(z, grid, b) / beta)
            evidence += chance * inside.sum() * (grid[1] - grid[0])
    params = {
        "z_logit": np.float32(0.6),
        "mean": numbers(48, 2),
        "log_scale": np.array([-0.3, 0.2], np.float32),
        "b_shift": np.float32(0.4),
        "b_slope": np.float32(0.5),
    }
    log_z = float(np.log(evidence))
    return Oracle(policy, guide, params, beta, objective, beta * log_z, log_z, tail=("b",))


@register
def jump() -> Oracle:
    """A number with a prize beyond a threshold."""
    beta, threshold = 0.5, 0.3

    def policy() -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        bayesrl.reward("prize", jnp.where(x > threshold, 1.0, 0.0) + 0.2 * x)

    def guide() -> None:
        mean, log_scale = numpyro.param("mean", jnp.array(0.0)), numpyro.param("log_scale", jnp.array(0.0))
        numpyro.sample("x", dist.Normal(mean, jnp.exp(log_scale)))

    def objective(p: Params) -> Array:
        m, s = p["mean"], jnp.exp(p["log_scale"])
        return norm.cdf((m - threshold) / s) + 0.2 * m - beta * normal_kl(m, s)

    grid = np.linspace(-9, 9, 200001)
    inside = np.exp(-0.5 * grid**2 + ((grid > threshold) + 0.2 * grid) / beta) / np.sqrt(2 * np.pi)
    log_z = float(np.log(inside.sum() * (grid[1] - grid[0])))
    params = {"mean": np.float32(-0.4), "log_scale": np.float32(-0.2)}
    return Oracle(policy, guide, params, beta, objective, beta * log_z, log_z)


@register
def answered() -> Oracle:
    """A number, and nature's coin whose odds it sets: pathwise action, discrete nature."""
    beta = 0.5

    def policy() -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        h = bayesrl.environment("h", dist.Bernoulli(logits=2.0 * x), observable=False)
        bayesrl.reward("payoff", h * (1.0 + 0.5 * x) - 0.1 * x**2)

    def guide() -> None:
        mean, log_scale = numpyro.param("mean", jnp.array(0.0)), numpyro.param("log_scale", jnp.array(0.0))
        numpyro.sample("x", dist.Normal(mean, jnp.exp(log_scale)))

    points, weights = nodes()

    def objective(p: Params) -> Array:
        m, s = p["mean"], jnp.exp(p["log_scale"])
        x = m + s * points
        payoff = jax.nn.sigmoid(2.0 * x) * (1.0 + 0.5 * x) - 0.1 * x**2
        return (weights * payoff).sum() - beta * normal_kl(m, s)

    grid = np.linspace(-9, 9, 20001)
    expected = (1 + 0.5 * grid) / (1 + np.exp(-2 * grid)) - 0.1 * grid**2
    inside = np.exp(-0.5 * grid**2 + expected / beta) / np.sqrt(2 * np.pi)
    optimum = float(beta * np.log(inside.sum() * (grid[1] - grid[0])))
    params = {"mean": np.float32(0.4), "log_scale": np.float32(-0.2)}
    return Oracle(policy, guide, params, beta, objective, optimum)
