"""What people write out of NumPyro's habits works, or is refused by a named error that names the way."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import autoguide

import bayesrl
from bayesrl.errors import BayesRLError, EngineError, FitError, GuideError, PolicyError
from bayesrl.svi.optimizers import as_optimizer, check_update

KEY = jax.random.key(0)
fit = partial(bayesrl.fit, KEY, beta=0.5, num_steps=200, progress=False)
J_STAR = 0.5544555698867799  # 0.5 · log of the mean of exp(payoff / 0.5)


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
    bayesrl.reward("payoff", jnp.array([0.1, 0.3, 0.9])[arm])


def gauss(x: Any = 0.0) -> None:
    bayesrl.reward("r", numpyro.sample("z", dist.Normal(x, 1.0)))


def chain(length: int = 4) -> None:
    def body(carry: Any, _: Any) -> Any:
        action = numpyro.sample("action", dist.Bernoulli(0.5))
        bayesrl.reward("payoff", 1.0 * action)
        return carry, action

    scan(body, None, None, length=length)


def two_scans() -> None:
    """What the refusal of a partly conditioned scan says to write."""

    def body(name: str, carry: Any, seen: Any) -> Any:
        action = numpyro.sample(name, dist.Bernoulli(0.5), obs=seen)
        bayesrl.reward(f"payoff of {name}", 1.0 * action)
        return carry, None

    scan(partial(body, "seen"), None, jnp.array([1, 0]))
    scan(lambda carry, _: body("action", carry, None), None, None, length=2)


def branching() -> None:
    if numpyro.sample("z", dist.Bernoulli(0.5)):
        bayesrl.reward("r", 1.0)


def counting() -> None:
    for _ in range(numpyro.sample("z", dist.Categorical(logits=jnp.zeros(3)))):
        pass


def indexing() -> None:
    bayesrl.reward("r", [0.0, 1.0][numpyro.sample("z", dist.Bernoulli(0.5))])


def casting() -> None:
    bayesrl.reward("r", float(numpyro.sample("z", dist.Normal(0.0, 1.0))))


def calling_numpy() -> None:
    bayesrl.reward("r", np.sin(numpyro.sample("z", dist.Normal(0.0, 1.0))))


def branching_in_scan() -> None:
    scan(lambda carry, _: (branching(), None), None, None, length=2)


def plate_around_scan() -> None:
    with numpyro.plate("n", 3):
        chain()


def scan_in_scan() -> None:
    scan(lambda carry, _: (chain(), None), None, None, length=2)


def lax_scan() -> None:
    def body(total: Any, _: Any) -> Any:
        return total + numpyro.sample("z", dist.Bernoulli(0.5)), None

    bayesrl.reward("r", 1.0 * jax.lax.scan(body, 0, None, length=3)[0])


def lax_cond() -> None:
    a = numpyro.sample("a", dist.Bernoulli(0.5))
    bayesrl.reward("r", jax.lax.cond(a > 0, lambda: numpyro.sample("z", dist.Normal(0.0, 1.0)), lambda: 0.0))


def numpyro_cond() -> None:
    a = numpyro.sample("a", dist.Bernoulli(0.5))

    def draw(mean: Any, _: Any) -> Any:
        return numpyro.sample("z", dist.Normal(mean, 1.0))

    bayesrl.reward("r", cond(a > 0, partial(draw, 0.0), partial(draw, 1.0), None))


def repeated() -> None:
    bayesrl.reward("r", numpyro.sample("z", dist.Normal(0.0, 1.0), sample_shape=(3,)).sum())


def seeded_inside() -> None:
    with handlers.seed(rng_seed=0):
        gauss()


def with_an_argument(x: Any) -> None:
    gauss(x)


PARTLY = handlers.condition(chain, {"action": jnp.array([1, 0])})

REFUSED: list[tuple[Callable[..., Any], str]] = [
    (PARTLY, "'action' is conditioned at 2 of the 4 steps"),
    (handlers.condition(chain, {"action": jnp.array([1])}), "'action' is conditioned at 1 of the 4 steps"),
    (handlers.condition(chain, condition_fn=lambda site: jnp.ones(3) if site["name"] == "action" else None), "at 3 of"),
    (handlers.condition(chain, {"action": jnp.ones(6)}), "one value per step"),
    (handlers.condition(chain, {"action": jnp.ones((4, 2))}), "one value per step"),
    (handlers.substitute(chain, {"action": jnp.ones(4)}), "'action' is held at a value"),
    (handlers.substitute(gauss, {"z": 1.0}), "'z' is held at a value"),
    (handlers.do(chain, {"action": 1}), "'action', which a scan hides"),
    (handlers.seed(bandit, 0), "'arm' brings a random key"),
    (seeded_inside, "'z' brings a random key"),
    (branching, "if numpyro.sample"),
    (counting, "for _ in range"),
    (indexing, re.escape("[0.0, 1.0]")),
    (casting, "float"),
    (calling_numpy, "np.sin"),
    (branching_in_scan, "if numpyro.sample"),
    (plate_around_scan, "scan inside of a plate"),
    (scan_in_scan, "scan stands inside of a scan"),
    (lax_scan, "'z' is drawn inside of jax.lax.scan"),
    (lax_cond, "'z' is drawn inside of jax.lax.scan, cond"),
    (numpyro_cond, "jnp.where"),
    (repeated, r"'z' is drawn with sample_shape=\(3,\)"),
    (with_an_argument, "missing a required argument: 'x'"),
]


@pytest.mark.parametrize(("policy", "words"), REFUSED, ids=lambda x: getattr(x, "__name__", str(x))[:40])
def test_policies_that_cannot_be_followed(policy: Any, words: str) -> None:
    asked: list[Callable[[], Any]] = [
        lambda: fit(policy),
        lambda: bayesrl.enumerate_posterior(policy, beta=0.5),
        lambda: bayesrl.importance(KEY, policy, beta=0.5, num_samples=10),
        lambda: bayesrl.rejection(KEY, policy, beta=0.5, num_samples=10),
    ]
    for ask in asked:
        with pytest.raises(PolicyError, match=words):
            ask()


def test_the_density_of_a_partly_conditioned_scan() -> None:
    with pytest.raises(PolicyError, match="2 of the 4 steps"):
        bayesrl.log_density(PARTLY, {}, beta=0.5)


def test_the_way_that_the_refusal_of_a_partly_conditioned_scan_names() -> None:
    wanted = 1 / 0.5 + 2 * np.log(0.5 + 0.5 * np.exp(1 / 0.5))
    assert float(bayesrl.enumerate_posterior(two_scans, beta=0.5).log_evidence.mean) == pytest.approx(wanted, abs=1e-4)


def test_a_wholly_conditioned_policy_leaves_nothing_to_choose() -> None:
    whole = handlers.condition(bandit, {"arm": jnp.array(2)})
    for ask in (
        lambda: bayesrl.enumerate_posterior(whole, beta=0.5),
        lambda: bayesrl.importance(KEY, whole, beta=0.5),
    ):
        with pytest.raises(EngineError, match="'arm' is observed"):
            ask()
    with pytest.raises(FitError, match="nothing to fit"):
        fit(whole)


def guide_of(*names: str) -> Callable[..., None]:
    def guide() -> None:
        numpyro.sample("z", dist.Normal(numpyro.param("m", 0.0), 1.0))

    def two(x: Any, y: Any) -> None:
        guide()

    def keyword(x: Any, *, scale: Any) -> None:
        guide()

    return {"none": guide, "two": two, "keyword": keyword}[names[0]]


def deciding() -> None:
    if numpyro.sample("z", dist.Normal(numpyro.param("m", 0.0), 1.0)) > 0:
        pass


def nature() -> None:
    bayesrl.environment("rain", dist.Normal(0.0, 1.0), observable=True)
    gauss()


def normal_chain() -> None:
    scan(lambda c, _: (c, bayesrl.reward("r", numpyro.sample("z", dist.Normal(0.0, 1.0)))), None, None, length=2)


@pytest.mark.parametrize(
    ("policy", "args", "guide", "words"),
    [
        (gauss, (0.3,), guide_of("none"), "takes guide()"),
        (gauss, (0.3,), guide_of("two"), "missing a required argument: 'y'"),
        (gauss, (0.3,), guide_of("keyword"), "functools.partial"),
        (gauss, (), deciding, "the guide asks in Python"),
        (gauss, (), autoguide.AutoNormal, r"AutoNormal\(policy\)"),
        (gauss, (), bayesrl.guides.AutoTilt, r"AutoTilt\(\)"),
        (gauss, (), autoguide.AutoDelta(gauss), "most probable point"),
        (gauss, (), autoguide.AutoDiagonalNormal(gauss), "auxiliary vector"),
        (gauss, (), autoguide.AutoMultivariateNormal(gauss), r"bayesrl.tilt\(policy, beta\)"),
        (gauss, (), autoguide.AutoLaplaceApproximation(gauss), "auxiliary vector"),
        (gauss, (), autoguide.AutoDAIS(gauss), "auxiliary vector"),
        (bandit, (), autoguide.AutoNormal(bandit), "discrete site 'arm'"),
        (nature, (), autoguide.AutoNormal(nature), "'rain', which is nature's"),
        (normal_chain, (), autoguide.AutoNormal(normal_chain), "outside of its scan"),
    ],
)
def test_guides_that_cannot_be_followed(policy: Any, args: Any, guide: Any, words: str) -> None:
    with pytest.raises(GuideError, match=words):
        fit(policy, *args, guide=guide)


def mini_batch() -> None:
    with numpyro.plate("n", 6, subsample_size=2):
        gauss()


def in_a_plate() -> None:
    with numpyro.plate("n", 6, subsample_size=2):
        numpyro.sample("z", dist.Normal(numpyro.param("m", jnp.zeros(6), event_dim=0), 1.0))


@pytest.mark.parametrize("guide", [autoguide.AutoNormal(mini_batch, init_scale=0.9), in_a_plate])
def test_parameters_in_a_plate_are_those_of_all_its_elements(guide: Any) -> None:
    """The best of each element is 0.5 · log E[exp(2z)] = 1."""
    posterior = fit(mini_batch, guide=guide, optimizer=optax.adam(0.05))
    assert all(leaf.shape[1:] == (6,) for leaf in jax.tree.leaves(posterior.params))
    assert float(posterior.estimate(KEY, 500).objective.mean[0]) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    "optimizer",
    [
        numpyro.optim.Adam(0.05),
        numpyro.optim.Momentum(0.1, 0.9),
        numpyro.optim.Adagrad(0.5),
        optax.lbfgs(),
        optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
    ],
    ids=lambda x: type(x).__name__,
)
def test_optimisers_of_both_kinds(optimizer: Any) -> None:
    """The bandit is enumerated, so a fit has no noise of its own."""
    posterior = fit(bandit, optimizer=optimizer)
    assert float(posterior.history["objective"][-1, 0]) == pytest.approx(J_STAR, rel=0.01)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (numpyro.optim.Minimize(), "optax.lbfgs"),
        (numpyro.optim.SM3(0.1), "cannot take a step"),
        (numpyro.optim.Adam, "Adam is not called yet"),
        (optax.adam, "adam is not called yet"),
        (0.05, "learning_rate=0.05"),
        ("adam", "not an Optax optimiser"),
        (optax.lbfgs(linesearch=None), "searches along a line"),
    ],
)
def test_optimisers_that_cannot_be_used(optimizer: Any, words: str) -> None:
    with pytest.raises(FitError, match=words):
        check_update(as_optimizer(optimizer), {"x": jnp.zeros((2, 3))})


def test_a_language_model_without_a_guide() -> None:
    from bayesrl import lm

    tokenizer = lm.char_tokenizer("ab ")
    config = lm.GPT2Config(vocab_size=tokenizer.vocab_size, max_length=8, width=8, depth=1, heads=2)
    model = lm.Pretrained(lm.GPT2.init(KEY, config), tokenizer)
    policy = lm.policy(model, ["a "], reward=lambda text: 1.0 * text.count("a"), max_new_tokens=4, stop_at_eos=False)
    with pytest.raises(BayesRLError, match=r"bayesrl.lm.LoRA\(rank=8\)"):
        fit(policy)
