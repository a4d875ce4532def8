"""The automatic guide against enumeration, backward induction and closed forms.

Tolerances are shares of J* − J(π₀), several times what was measured; keys are fixed.
"""

from dataclasses import replace
from functools import partial
from itertools import product

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density
from scipy import stats

from bayesrl.core.draws import Draws
from bayesrl.core.handlers import tilt
from bayesrl.core.primitives import environment, reward
from bayesrl.core.programs import Programs, declared_params, freeze
from bayesrl.core.structure import inspect
from bayesrl.core.trace import trace_abstractly, trace_program
from bayesrl.core.validation import check_draws, check_sites
from bayesrl.errors import GuideError
from bayesrl.guides import AutoTilt
from bayesrl.guides.tilts.families import tilt_distribution, tilt_shape
from bayesrl.objectives import ReverseKL

KEY = jax.random.key(7)


def make_pair(policy, *args, family=None):
    structure = inspect(KEY, policy, *args)
    guide = (family or AutoTilt()).build(KEY, policy, structure, args)
    params, transforms = declared_params(KEY, guide, *args)
    frozen, _ = freeze(KEY, policy, *args)
    return Programs(frozen, guide, structure, args, transforms), params


def drawer(programs, num_draws):
    """Draw by one program, which other parameters share, and not operation by operation."""
    return jax.jit(partial(programs.draw, KEY, num_draws=num_draws))


def checked(programs, params, num_draws=64, draw=None):
    """Check a guide as if it might leave the prior's support, and give the draws."""
    check_sites(programs, params)
    draws = (draw or drawer(programs, num_draws))(params)
    doubted = replace(programs, guide=partial(programs.guide))  # which does not say that it is within the prior
    check_draws(KEY, doubted, params, draws, draws.totals((num_draws, *programs.structure.context_shape)))
    return draws


def fit(policy, *args, beta, family=None, num_steps=1000, rate=None, num_particles=64):
    programs, params = make_pair(policy, *args, family=family)
    check_sites(programs, params)
    objective = ReverseKL(num_particles=num_particles).prepare(KEY, programs, params)
    rate = rate or (family or AutoTilt()).learning_rate_for(params)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))

    def step(state, key):
        params, opt_state = state
        gradient = jax.grad(lambda p: objective.evaluate(key, p, programs, beta)[0])(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    run = jax.jit(lambda params, keys: lax.scan(step, (params, optimizer.init(params)), keys)[0][0])
    return programs, run(params, jax.random.split(KEY, num_steps))


def held(sites):
    """Make draws of given site values, to be scored."""
    return Draws.from_sites({name: jnp.asarray(value) for name, value in sites.items()})


def log_q(programs, params, sites):
    scores = jax.jit(programs.log_q)(params, held(sites))
    return np.asarray(sum(score.sum(-1) for score in scores.values()))


def share_left(log_prior, rewards, beta, log_q):
    """Gap of an enumerated q as a share of J* − J(π₀)."""
    best = beta * np.log(np.exp(log_prior + rewards / beta).sum())
    first = (np.exp(log_prior) * rewards).sum()
    np.testing.assert_allclose(np.exp(log_q).sum(), 1.0, atol=1e-4)
    value = (np.exp(log_q) * (rewards + beta * (log_prior - log_q))).sum()
    return (best - value) / (best - first)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tilt_kind", "lower", "upper"), [("auto", -1e-4, 1e-3), ("network", -1e-4, 5e-3), ("constant", 0.1, 1)]
)
def test_three_dependent_choices(tilt_kind, lower, upper):
    rng = np.random.default_rng(0)
    sizes = (4, 2, 5)
    first, second, third = (rng.normal(size=sizes[: i + 1]) for i in range(3))
    a, b, c = np.meshgrid(*(np.arange(n) for n in sizes), indexing="ij")
    payoff = rng.normal(size=sizes) + 2.0 * ((a + b + c) % 3 == 0)

    def policy():
        a = numpyro.sample("a", dist.Categorical(logits=jnp.asarray(first)))
        b = numpyro.sample("b", dist.Categorical(logits=jnp.asarray(second)[a]))
        c = numpyro.sample("c", dist.Categorical(logits=jnp.asarray(third)[a, b]))
        reward("payoff", jnp.asarray(payoff)[a, b, c])

    num_particles = 64 if tilt_kind == "network" else 16
    programs, params = fit(policy, beta=0.6, family=AutoTilt(tilt=tilt_kind), num_particles=num_particles)
    log_prior = log_softmax(first)[:, None, None] + log_softmax(second)[:, :, None] + log_softmax(third)
    grid = {"a": a.ravel(), "b": b.ravel(), "c": c.ravel()}
    left = share_left(log_prior.ravel(), payoff.ravel(), 0.6, log_q(programs, params, grid))
    assert lower < left < upper


def random_chain(seed, num_states=10, num_actions=2):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_states, num_actions))
    probs = rng.dirichlet(np.ones(num_states) / 2, size=(num_states, num_actions))
    return logits, probs, rng.normal(size=(num_states, num_actions))


def test_chain_with_observable_nature():
    logits, probs, payoff = random_chain(1)
    steps, beta = 20, 0.5

    def policy():
        def step(state, _):
            action = numpyro.sample("action", dist.Categorical(logits=jnp.asarray(logits)[state]))
            reward("payoff", jnp.asarray(payoff)[state, action])
            return environment(
                "state", dist.Categorical(probs=jnp.asarray(probs)[state, action]), observable=True
            ), None

        scan(step, 0, jnp.arange(steps))

    _, params = fit(policy, beta=beta, num_steps=1500)
    log_prior = log_softmax(logits)
    tilted_log_q = log_softmax(logits + np.asarray(params["action$table"]))
    best = first = value = np.zeros(len(logits))
    for t in reversed(range(steps)):
        log_q = tilted_log_q[t]
        best = beta * np.log(np.exp(log_prior + (payoff + probs @ best) / beta).sum(-1))
        first = (np.exp(log_prior) * (payoff + probs @ first)).sum(-1)
        value = (np.exp(log_q) * (payoff + beta * (log_prior - log_q) + probs @ value)).sum(-1)
    assert -1e-4 < (best[0] - value[0]) / (best[0] - first[0]) < 0.01


def test_markov_tokens_without_nature():
    rng = np.random.default_rng(2)
    logits, payoff = rng.normal(size=(6, 6)), rng.normal(size=(6, 6))
    steps, beta = 5, 0.5

    def policy():
        def step(before, _):
            token = numpyro.sample("token", dist.Categorical(logits=jnp.asarray(logits)[before]))
            reward("payoff", jnp.asarray(payoff)[before, token])
            return token, None

        scan(step, 2, None, length=steps)

    _, params = fit(policy, beta=beta, num_steps=1500)
    log_prior, best, value = log_softmax(logits), np.zeros(6), np.zeros(6)
    for t in reversed(range(steps)):
        log_q = log_softmax(logits + np.asarray(params["token$table"])[t])
        best = beta * np.log(np.exp(log_prior + (payoff + best) / beta).sum(-1))
        value = (np.exp(log_q) * (payoff + beta * (log_prior - log_q) + value)).sum(-1)
    assert abs(best[2] - value[2]) < 1e-3


def test_a_shift_register_enters_the_table():
    """Two leaves of the carry copy the last two actions; their ranges are found through the copies."""

    def policy():
        def step(carry, _):
            last, before = carry
            x = numpyro.sample("x", dist.Categorical(logits=jnp.zeros(3)))
            reward("r", 1.0 * (x == before))
            return (x, last), None

        scan(step, (0, 4), None, length=4)

    _, params = make_pair(policy)
    assert {name: value.shape for name, value in params.items()} == {"x$table": (4, 3, 4, 3)}


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "lower", "upper"), [(AutoTilt(), -1e-4, 0.02), (AutoTilt(recurrent=False), 0.1, 1)])
def test_reward_after_the_scan(family, lower, upper):
    steps, beta = 8, 0.7
    payoff = np.abs(np.arange(steps + 1) - 4.0) / 2

    def policy():
        def step(carry, _):
            x = numpyro.sample("x", dist.Bernoulli(0.4))
            return carry, x

        _, xs = scan(step, 0, None, length=steps)
        reward("payoff", jnp.asarray(payoff)[xs.sum()])

    programs, params = fit(policy, beta=beta, family=family, num_steps=800)
    grid = np.array(list(product([0, 1], repeat=steps)))
    log_prior = (grid * np.log(0.4) + (1 - grid) * np.log(0.6)).sum(1)
    left = share_left(log_prior, payoff[grid.sum(1)], beta, log_q(programs, params, {"x": grid}))
    assert lower < left < upper


def test_a_hidden_coin_is_not_read():
    """The best that a blind agent can do: Q(guess) from E[reward | guess], β·log mean exp(.5/β) = .5."""

    def policy():
        coin = environment("coin", dist.Bernoulli(0.5), observable=False)
        guess = numpyro.sample("guess", dist.Bernoulli(0.5))
        reward("right", 1.0 * (guess == coin))

    programs, params = fit(policy, beta=0.2, num_steps=200)
    sites = {"coin": np.array([0, 0, 1, 1]), "guess": np.array([0, 1, 0, 1])}
    scores = log_q(programs, params, sites)
    np.testing.assert_allclose(scores[:2], scores[2:], atol=1e-6)
    assert set(params) == {"guess$table"}
    assert params["guess$table"].shape == (1,)


@pytest.mark.parametrize("where", ["before", "inside", "carry", "closure"])
def test_hidden_nature_in_scans_is_not_read(where):
    """Scores may depend on what was seen before, never on the hidden value itself."""

    def policy():
        start = environment("coin", dist.Bernoulli(0.5), observable=False) if where != "inside" else 0

        def step(carry, _):
            coin, last = carry
            if where == "inside":
                coin = environment("coin", dist.Bernoulli(0.5), observable=False)
            elif where == "closure":
                coin = start
            guess = numpyro.sample("guess", dist.Bernoulli(0.5))
            reward("right", 1.0 * (guess == coin))
            sum_ = jnp.where(coin == 1, last + 1.0, last)
            return (coin, sum_ if where != "before" else last), None

        scan(step, (start, 0.0), None, length=4)

    programs, params = make_pair(policy)
    params = AutoTilt().overdispersed_init(KEY, params)
    guesses = np.array([[0, 1, 1, 0]])
    hidden = [np.zeros((1, 4), int), np.array([[1, 0, 1, 1]])] if where == "inside" else [np.array([0]), np.array([1])]
    scores = [log_q(programs, params, {"guess": guesses, "coin": coin}) for coin in hidden]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
    assert abs(scores[0][0] - 4 * np.log(0.5)) > 1e-3


def test_a_clue_about_a_hidden_coin_is_used():
    """Noisy sightings inside the scan are evidence of the coin: memory is worth more than the last sighting.

    The blind-filtering optimum is by enumeration of all sighting sequences: at each step the guess
    is tilted by its expected reward under p(coin | sightings), and no guess changes what comes.
    """
    steps, beta, right = 4, 0.25, 0.8

    def policy():
        coin = environment("coin", dist.Bernoulli(0.5), observable=False)

        def step(carry, _):
            guess = numpyro.sample("guess", dist.Bernoulli(0.5))
            reward("right", 1.0 * (guess == coin))
            environment("clue", dist.Bernoulli(jnp.where(coin == 1, right, 1 - right)), observable=True)
            return carry, None

        scan(step, 0, None, length=steps)

    programs, params = fit(policy, beta=beta, num_steps=2000)
    clues = np.array(list(product([0, 1], repeat=steps)))
    like = [np.prod(np.where(clues == coin, right, 1 - right), 1) for coin in (0, 1)]
    coins, guesses = np.arange(2), clues
    rows = [(c, k, g) for c in coins for k in range(len(clues)) for g in range(len(guesses))]
    c, k, g = (np.array(column) for column in zip(*rows, strict=True))
    scores = log_q(programs, params, {"coin": c, "clue": clues[k], "guess": guesses[g]})
    weight = 0.5 * np.where(c == 0, like[0][k], like[1][k]) * np.exp(scores)
    gains = (guesses[g] == c[:, None]).sum(1) + beta * (steps * np.log(0.5) - scores)
    value = (weight * gains).sum()
    best = 0.0
    for t in range(steps):
        for seen in product([0, 1], repeat=t):
            joint = [0.5 * np.prod([right if s == coin else 1 - right for s in seen]) for coin in (0, 1)]
            belief = joint[1] / sum(joint)
            best += sum(joint) * beta * np.log(0.5 * (np.exp(belief / beta) + np.exp((1 - belief) / beta)))
    first = steps * 0.5
    np.testing.assert_allclose(weight.sum(), 1.0, atol=1e-4)
    assert -1e-4 < (best - value) / (best - first) < 0.02


# --- continuous and unbounded sites ----------------------------------------------------------------------------------


def test_quadratic_reward_gives_the_exact_gaussian():
    """N(1, 2²) tilted by −(x − 3)²/2 at β = .5 has precision 1/4 + 2 and mean (1/4 + 6)/(9/4)."""

    def policy():
        x = numpyro.sample("x", dist.Normal(1.0, 2.0))
        reward("near", -0.5 * (x - 3.0) ** 2)

    programs, params = fit(policy, beta=0.5, num_steps=800)
    site = programs.run_guide(KEY, None, params, {}, ()).sites["x"].fn
    assert isinstance(site, dist.Normal)
    np.testing.assert_allclose([site.loc, site.scale], [6.25 / 2.25, (1 / 2.25) ** 0.5], rtol=1e-3)


def test_normal_normal_posterior():
    data = jnp.array([0.3, 1.2, 0.7, 2.0])

    def policy():
        mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
        with numpyro.plate("data", 4):
            numpyro.sample("y", dist.Normal(mean, 1.0), obs=data)

    programs, params = fit(policy, beta=1.0, num_steps=800)
    site = programs.run_guide(KEY, None, params, {}, ()).sites["mean"].fn
    np.testing.assert_allclose([site.loc, site.scale], [4.2 / 4.25, 4.25**-0.5], rtol=1e-3)


def test_correlated_gaussian_target():
    """x, y ~ N(0, 1), reward −(x − y)²: y given x is N(2x/3, 1/3); x has precision 1 + 2/3 at β = 1."""

    def policy():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        y = numpyro.sample("y", dist.Normal(0.0, 1.0))
        reward("near", -((x - y) ** 2))

    programs, params = fit(policy, beta=1.0, num_steps=2000)
    sites = {"x": np.array([-1.0, 0.0, 1.5]), "y": np.array([0.2, -0.7, 0.4])}
    precision = np.array([[3.0, -2.0], [-2.0, 3.0]])
    points = np.stack([sites["x"], sites["y"]], -1)
    exact = 0.5 * np.log(np.linalg.det(precision)) - np.log(2 * np.pi)
    exact = exact - 0.5 * np.einsum("ni,ij,nj->n", points, precision, points)
    np.testing.assert_allclose(log_q(programs, params, sites), exact, atol=0.03)


def test_vector_event_gets_a_triangular_map():
    """N(0, I) tilted to a correlated Gaussian: the whole covariance is learned at one site."""
    precision = np.array([[1.0, 0.6], [0.6, 2.0]])

    def policy():
        x = numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        reward("near", -0.5 * x @ jnp.asarray(precision) @ x)

    programs, params = fit(policy, beta=1.0, num_steps=800)
    points = np.random.default_rng(0).normal(size=(5, 2))
    exact = stats.multivariate_normal(cov=np.linalg.inv(np.eye(2) + precision)).logpdf(points)
    np.testing.assert_allclose(log_q(programs, params, {"x": points}), exact, atol=0.01)


def test_poisson_tilts_to_poisson():
    """Poisson(10) with reward x·log 1.1 at β = 1 becomes Poisson(11), log Z = 1."""

    def policy():
        x = numpyro.sample("x", dist.Poisson(10.0))
        reward("r", x * jnp.log(1.1))

    programs, params = fit(policy, beta=1.0, num_steps=800)
    counts = np.arange(40)
    mass = np.exp(log_q(programs, params, {"x": counts}))
    np.testing.assert_allclose(mass, stats.poisson(11.0).pmf(counts), atol=2e-3)
    draws = drawer(programs, 64)(params)
    np.testing.assert_allclose(draws.totals((64,)).log_weight(1.0), 1.0, atol=0.01)


# --- contexts --------------------------------------------------------------------------------------------------------


def contexts(num, size=None):
    def policy(logits, payoff):
        with numpyro.plate("context", num, subsample_size=size) as i:
            arm = numpyro.sample("arm", dist.Categorical(logits=logits[i]))
            sign = numpyro.sample("sign", dist.Bernoulli(0.5))
            reward("payoff", payoff[i, arm] * (2.0 * sign - 1.0))

    return policy


@pytest.mark.parametrize("size", [None, 5])
def test_contexts_with_and_without_subsampling(size):
    rng = np.random.default_rng(5)
    logits, payoff = rng.normal(size=(20, 3)), rng.normal(size=(20, 3))
    _, params = fit(
        contexts(20, size), jnp.asarray(logits), jnp.asarray(payoff), beta=0.5, num_steps=800, num_particles=32
    )
    assert params["arm$table"].shape == (20, 3)
    assert params["sign$table"].shape == (20, 3, 1)
    soft = 0.5 * np.log(np.cosh(payoff / 0.5))
    exact = log_softmax(log_softmax(logits) + soft / 0.5)
    fitted = log_softmax(logits + np.asarray(params["arm$table"]))
    worst = 0.5 * (np.exp(fitted) * (fitted - exact)).sum(-1).max()
    assert worst < 0.01
    signs = 1 / (1 + np.exp(-np.asarray(params["sign$table"][..., 0])))
    gap = np.abs(signs - 1 / (1 + np.exp(-2 * payoff / 0.5))) * np.exp(exact)
    assert gap.max() < 0.02


class Behaviour(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(self.layer)(x)


def test_network_in_the_policy_inside_a_plate():
    inputs = jax.random.normal(KEY, (12, 4))
    labels = jnp.arange(12) % 3
    module = Behaviour(eqx.nn.Linear(4, 3, key=KEY))

    def policy(inputs, labels):
        network = eqx_module("network", module)
        with numpyro.plate("image", len(inputs), subsample_size=6) as i:
            guess = numpyro.sample("guess", dist.Categorical(logits=network(inputs[i])))
            reward("right", 1.0 * (guess == labels[i]))

    family = AutoTilt(tilt="network")
    programs, params = fit(policy, inputs, labels, beta=0.5, family=family, num_steps=300)
    assert any("network$params" in name for name in params)
    assert programs.structure.contexts[0].full_size == 12
    declared, _ = declared_params(KEY, programs.guide, inputs, labels)
    assert bool((declared["network$params"].layer.weight == module.layer.weight).all())
    more = jnp.concatenate([inputs, inputs])
    longer = (more, jnp.concatenate([labels, labels]))
    trace_abstractly(lambda: trace_program(handlers.seed(handlers.substitute(programs.guide, params), 0), *longer))
    draw = drawer(programs, 256)
    draws = draw(params)
    totals = draws.totals((256, 6))
    start = draw(declared).totals((256, 6))
    assert float(totals.log_weight(0.5).mean()) > float(start.log_weight(0.5).mean()) + 0.1
    table, _ = make_pair(policy, inputs, labels)
    with pytest.raises(GuideError, match=r"'image' had 12 elements .*tilt='network'"):
        trace_abstractly(lambda: trace_program(handlers.seed(table.guide, 0), *longer))


def test_a_site_outside_a_plate_is_read_inside_and_not_the_other_way():
    def policy():
        a = numpyro.sample("a", dist.Bernoulli(0.5))
        with numpyro.plate("p", 3):
            b = numpyro.sample("b", dist.Bernoulli(0.5))
        c = numpyro.sample("c", dist.Bernoulli(0.5))
        reward("r", 1.0 * a * c * b.sum())

    _, params = make_pair(policy)
    assert {name: value.shape for name, value in params.items()} == {
        "a$table": (1,),
        "b$table": (3, 2, 1),
        "c$table": (2, 1),
    }


def test_plates_inside_a_scan():
    """Two plates, one made before the scan and subsampled, one in the body; carries are per element."""

    def policy(payoff):
        outer = numpyro.plate("outer", 6, subsample_size=4, dim=-2)
        with outer as i:
            pass

        def step(carry, _):
            last, level = carry
            with outer, numpyro.plate("inner", 3, dim=-1):
                x = numpyro.sample("x", dist.Categorical(logits=jnp.zeros(2)))
                y = numpyro.sample("y", dist.Normal(level, 1.0))
                reward("r", payoff[i][:, None] * x * (last == x) - y**2)
            return (x, 0.5 * level + y), None

        scan(step, (jnp.zeros((4, 3), int), jnp.zeros((4, 3))), None, length=5)

    programs, params = make_pair(policy, jnp.arange(6.0))
    assert params["x$table"].shape == (5, 6, 3, 2, 2)
    draws = checked(programs, params)
    np.testing.assert_allclose(draws.log_q["x"], draws.log_prior["x"], atol=1e-5)
    params = AutoTilt().overdispersed_init(KEY, params)
    draws = drawer(programs, 3)(params)
    again = jax.jit(programs.log_q)(params, draws)
    for name in ("x", "y"):
        assert draws.log_q[name].shape == (3, 4, 3, 5)
        np.testing.assert_allclose(again[name], draws.log_q[name], rtol=1e-3, atol=1e-3)


# --- every distribution ----------------------------------------------------------------------------------------------

SCALARS = {
    "bernoulli": dist.Bernoulli(0.3),
    "bernoulli_logits": dist.Bernoulli(logits=0.3),
    "categorical": dist.Categorical(probs=jnp.array([0.2, 0.5, 0.3])),
    "categorical_zero": dist.Categorical(probs=jnp.array([0.0, 0.5, 0.5])),
    "ordered": dist.OrderedLogistic(0.3, jnp.array([-1.0, 1.0])),
    "binomial": dist.Binomial(7, 0.4),
    "poisson": dist.Poisson(4.0),
    "geometric": dist.Geometric(0.3),
    "negative_binomial": dist.NegativeBinomial2(4.0, 3.0),
    "beta_binomial": dist.BetaBinomial(2.0, 1.0, 6),
    "discrete_uniform": dist.DiscreteUniform(2, 6),
    "normal": dist.Normal(1.0, 2.0),
    "log_normal": dist.LogNormal(0.2, 0.5),
    "gamma": dist.Gamma(2.0, 1.5),
    "inverse_gamma": dist.InverseGamma(3.0, 2.0),
    "beta": dist.Beta(2.0, 3.0),
    "exponential": dist.Exponential(0.7),
    "half_normal": dist.HalfNormal(1.3),
    "half_cauchy": dist.HalfCauchy(1.0),
    "uniform": dist.Uniform(-1.0, 2.0),
    "student": dist.StudentT(4.0, 0.3, 1.2),
    "laplace": dist.Laplace(0.5, 1.0),
    "cauchy": dist.Cauchy(0.2, 0.8),
    "gumbel": dist.Gumbel(0.0, 1.0),
    "logistic": dist.Logistic(0.0, 1.0),
    "truncated_normal": dist.TruncatedNormal(0.0, 1.0, low=-0.5),
    "von_mises": dist.VonMises(0.0, 2.0),
    "weibull": dist.Weibull(1.0, 2.0),
}
VECTORS = {
    "bernoulli_event": dist.Bernoulli(jnp.array([0.2, 0.7, 0.4])).to_event(1),
    "categorical_event": dist.Categorical(logits=jnp.arange(6.0).reshape(2, 3)).to_event(1),
    "normal_event": dist.Normal(jnp.arange(3.0), 1.0).to_event(1),
    "uniform_event": dist.Uniform(jnp.zeros(2), jnp.array([1.0, 2.0])).to_event(1),
    "large_event": dist.Normal(jnp.zeros(40), 1.0).to_event(1),
    "dirichlet": dist.Dirichlet(jnp.array([2.0, 1.0, 3.0])),
    "multivariate_normal": dist.MultivariateNormal(jnp.arange(3.0), jnp.eye(3) + 0.3),
    "lkj_cholesky": dist.LKJCholesky(3, 2.0),
    "masked": dist.Normal(jnp.zeros(3), 1.0).mask(jnp.array([True, False, True])),
    "masked_gamma": dist.Gamma(jnp.ones(3), 1.0).mask(jnp.array([True, False, True])),
    "batched_bounds": dist.Uniform(jnp.array([0.0, -1.0, 1.0]), jnp.full(3, 2.0)),
    "expanded": dist.Categorical(logits=jnp.arange(3.0)).expand((4,)),
    "expanded_event": dist.Beta(2.0, 1.0).expand((4,)).to_event(1),
}


def one_site(fn, length=None, plate=None):
    def body(carry, _):
        if plate is None:
            x = numpyro.sample("x", fn)
            reward("r", 0.0 * jnp.sum(x))
        else:
            with numpyro.plate("p", plate, dim=-1 - len(fn.batch_shape)):
                x = numpyro.sample("x", fn)
            reward("r", 0.0 * jnp.sum(x))
        return carry, None

    def policy():
        if length is None:
            body(0, 0)
        else:
            scan(body, 0, None, length=length)

    return policy


# Finite supports that begin at 0 or later, unbounded and bounded numbers, vectors with and without batch axes.
IN_TIME = ("bernoulli_logits", "discrete_uniform", "gamma", "normal_event", "dirichlet", "masked", "expanded")
# Other ways to write what is drawn above: one tilt moves both alike.
TWINS = {
    "binomial": (dist.Binomial(7, 0.4), dist.Binomial(7, logits=np.log(0.4 / 0.6))),
    "negative_binomial": (dist.NegativeBinomial2(4.0, 3.0), dist.NegativeBinomial(3.0, 4.0 / 7.0)),
    "gamma_poisson": (dist.NegativeBinomial2(4.0, 3.0), dist.GammaPoisson(3.0, 0.75)),
}


def many_sites(fns):
    """Draw from each on its own."""

    def policy():
        for name, fn in fns.items():
            reward(f"r_{name}", 0.0 * jnp.sum(numpyro.sample(name, fn)))

    return policy


@pytest.mark.parametrize(
    ("policy", "names"),
    [(many_sites(SCALARS), list(SCALARS)), (many_sites(VECTORS), list(VECTORS))]
    + [(one_site((SCALARS | VECTORS)[name], 3, 2), ["x"]) for name in IN_TIME],
    ids=["scalars", "vectors", *IN_TIME],
)
def test_every_distribution_starts_at_the_prior_and_scores_its_draws(policy, names):
    """One program draws them all; their tilts read nothing, as if each were alone."""
    programs, params = make_pair(policy, family=AutoTilt(tilt="constant"))
    draw = drawer(programs, 8)
    draws = checked(programs, params, 8, draw) if names == list(VECTORS) else draw(params)
    other = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.3 * np.cos(np.arange(leaf.size)).reshape(leaf.shape), params)
    moved = draw(other)
    again = jax.jit(programs.log_q)(other, moved)
    for name in names:
        np.testing.assert_allclose(draws.log_q[name], draws.log_prior[name], rtol=2e-4, atol=2e-4, err_msg=name)
        log_q, log_prior = np.asarray(moved.log_q[name]), np.asarray(moved.log_prior[name])
        assert np.isfinite(log_q).all(), name
        assert np.isfinite(log_prior).all(), name
        assert np.abs(log_q - log_prior).max() > 1e-3, name
        np.testing.assert_allclose(again[name], log_q, rtol=2e-3, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("name", TWINS)
def test_parametrisations_of_one_distribution_tilt_alike(name):
    counts, theta = np.arange(8), np.array([0.3, -0.2], "float32")

    @jax.jit
    def scores(theta):
        found = []
        for fn in TWINS[name]:
            support = inspect(KEY, one_site(fn))["x"].support
            moved = tilt_distribution(fn, theta[: tilt_shape("x", fn, support)[0]], support)
            found += [fn.log_prob(counts), moved.log_prob(counts)]
        return found

    prior, moved, other_prior, other = scores(theta)
    np.testing.assert_allclose(other_prior, prior, rtol=1e-4)
    np.testing.assert_allclose(other, moved, rtol=1e-4)


def test_tilted_densities_sum_to_one_and_match_their_draws():
    """20,000 draws; the mean of a bounded statistic within five standard errors (false alarm 6e-7 each)."""
    structure = inspect(KEY, many_sites(SCALARS))
    supports = {name: structure[name].support for name in SCALARS}
    thetas = {
        name: 0.4 * np.cos(np.arange(tilt_shape("x", fn, supports[name])[0], dtype="float32"))
        for name, fn in SCALARS.items()
    }
    discrete = {name for name, fn in SCALARS.items() if fn.support.is_discrete}
    maps = {name: dist.biject_to(fn.support) for name, fn in SCALARS.items() if name not in discrete}

    def tilted(name, thetas):
        return tilt_distribution(SCALARS[name], thetas[name], supports[name])

    @jax.jit
    def draw_all(thetas):
        found = {}
        for name, fn in SCALARS.items():
            moved = tilted(name, thetas)
            assert moved.has_rsample == fn.has_rsample or name in discrete
            found[name] = moved.sample(KEY, (20_000,))
        return found, {name: transform.inv(found[name]) for name, transform in maps.items()}

    grids = {name: jnp.arange(400) if supports[name] is None else jnp.array(supports[name]) for name in discrete}

    @jax.jit
    def masses(thetas, ends):
        """Return the points and the masses around them."""
        found = {name: (grid, jnp.exp(tilted(name, thetas).log_prob(grid))) for name, grid in grids.items()}
        for name, transform in maps.items():
            low, high = ends[name]
            coordinates = low + (high - low) * jnp.linspace(0, 1, 20_001)
            grid = transform(coordinates)
            log_mass = tilted(name, thetas).log_prob(grid) + transform.log_abs_det_jacobian(coordinates, grid)
            found[name] = grid, jnp.exp(log_mass) * (high - low) / 20_000
        return found

    draws, unconstrained = draw_all(thetas)
    ends = {name: np.quantile(np.asarray(u), [0.0005, 0.9995]) for name, u in unconstrained.items()}
    for name, found in masses(thetas, ends).items():
        grid, mass, own = (np.asarray(x, float) for x in (*found, draws[name]))
        own = own if name in discrete else own[(own >= grid.min()) & (own <= grid.max())]
        centre, scale = np.median(own), np.std(own) + 1e-6
        np.testing.assert_allclose(mass.sum(), 1.0, atol=3e-3, err_msg=name)
        statistic = np.tanh((own - centre) / scale)
        expected = (mass * np.tanh((grid - centre) / scale)).sum() / mass.sum()
        assert abs(statistic.mean() - expected) < 5 * statistic.std() / len(own) ** 0.5 + 1e-4, name


@pytest.mark.parametrize("name", ["dirichlet", "multivariate_normal", "lkj_cholesky", "uniform_event"])
def test_vector_density_by_change_of_variables(name):
    """log q(x) = log p(x₀) − log|dx/dx₀|, the determinant by automatic differentiation in unconstrained space."""
    fn = VECTORS[name]
    theta = 0.3 * jnp.sin(1.0 + jnp.arange(tilt_shape("x", fn, None)[0]))
    transform = dist.biject_to(fn.support)

    @jax.jit
    def both(theta):
        moved = tilt_distribution(fn, theta, None)

        def through(u):
            return transform.inv(moved._forward(transform(u)))

        before = fn.sample(KEY)
        u = transform.inv(before)
        after = moved._forward(before)
        _, log_det = jnp.linalg.slogdet(jax.jacobian(through)(u))
        stretch = transform.log_abs_det_jacobian(through(u), after) - transform.log_abs_det_jacobian(u, before)
        return moved.log_prob(after), fn.log_prob(before) - log_det - stretch

    np.testing.assert_allclose(*both(theta), rtol=1e-3, atol=1e-3)


# --- working with others ---------------------------------------------------------------------------------------------


def mixed():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    weather = environment("weather", dist.Normal(x, 1.0), observable=True)
    numpyro.deterministic("metric", x + weather)

    def step(level, _):
        push = numpyro.sample("push", dist.Normal(0.0, 1.0))
        reward("calm", -((level + push) ** 2))
        return level + push, push

    _, pushes = scan(step, x, None, length=3)
    numpyro.sample("y", dist.Normal(pushes.sum(), 1.0), obs=0.5)


def test_numpyro_s_own_elbo_takes_the_guide():
    programs, _ = make_pair(mixed)
    trace = handlers.trace(handlers.seed(programs.guide, 0)).get_trace()
    sites = {name for name, site in trace.items() if site["type"] != "param"}
    assert sites == {"x", "weather", "push"}
    svi = SVI(tilt(mixed, 1.0), programs.guide, optax.adam(0.03), Trace_ELBO(8))
    result = svi.run(KEY, 300, progress_bar=False)
    assert float(result.losses[-50:].mean()) < float(result.losses[:50].mean())


def test_dispersed_starts_differ_and_run_in_one_program():
    programs, params = make_pair(mixed)
    starts = [AutoTilt().overdispersed_init(key, params) for key in jax.random.split(KEY, 3)]
    assert jax.tree.structure(starts[0]) == jax.tree.structure(params)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    draws = jax.jit(jax.vmap(lambda p: programs.draw(KEY, p, 4)))(stacked)
    kl = (draws.log_q["push"] - draws.log_prior["push"]).sum(-1)
    assert kl.shape == (3, 4)
    assert float(jnp.abs(kl[0] - kl[1]).max()) > 0.1


def test_first_objective_is_the_prior_s():
    programs, params = make_pair(mixed)
    draws = drawer(programs, 64)(params)
    for name in ("x", "push"):
        np.testing.assert_array_equal(draws.log_q[name], draws.log_prior[name])


def test_conditioned_draws_have_the_density_of_the_sites():
    programs, params = make_pair(mixed)
    params = AutoTilt().overdispersed_init(KEY, params)
    sites = {"x": jnp.array(0.3), "weather": jnp.array(0.1), "push": jnp.array([0.1, -0.4, 0.8])}
    value, _ = log_density(programs.guide, (), {}, {**params, **sites})
    nature = dist.Normal(0.3, 1.0).log_prob(0.1)
    ours = log_q(programs, params, {name: site[None] for name, site in sites.items()})
    np.testing.assert_allclose(value - nature, ours[0], rtol=1e-5)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn",
    [
        dist.Multinomial(3, jnp.ones(2) / 2),
        dist.BetaNegativeBinomial(5.0, 3.0, 4.0),
        dist.Delta(1.0),
    ],
)
def test_sites_without_a_tilt_are_refused(fn):
    def policy():
        x = numpyro.sample("odd", fn)
        reward("r", 0.0 * jnp.sum(x))

    with pytest.raises(GuideError, match=r"'odd'.*by hand"):
        make_pair(policy)


def test_a_table_that_does_not_fit_is_refused():
    def policy():
        xs = [numpyro.sample(f"x{i}", dist.Categorical(logits=jnp.zeros(10))) for i in range(4)]
        reward("r", 1.0 * sum(xs))

    with pytest.raises(GuideError, match=r"'x3' would have 10,000 entries.*max_table"):
        make_pair(policy, family=AutoTilt(tilt="table", max_table=5_000))
    _, params = make_pair(policy, family=AutoTilt(max_table=5_000))
    assert {name.split(".")[0] for name in params} == {"x0$table", "x1$table", "x2$table", "x3$table", "x3$network"}


@pytest.mark.parametrize("options", [{"tilt": "magic"}, {"hidden": 0}, {"max_table": 0}, {"recurrent": "maybe"}])
@pytest.mark.usefixtures("unchecked")
def test_options_out_of_range_are_refused(options):
    with pytest.raises(GuideError, match=next(iter(options))):
        AutoTilt(**options)
