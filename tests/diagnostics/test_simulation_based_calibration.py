"""Calibration by simulation: uniform ranks for exact inference, alarms for inference that is wrong by recipe."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from numpyro.contrib.control_flow import scan

import bayesrl
from bayesrl.diagnostics.rank_statistics import LIKELIHOOD, Calibration
from bayesrl.diagnostics.simulation_based_calibration import Drawer, calibrate, exact_inference, svi_inference
from bayesrl.errors import EngineError, PolicyError

KEY = jax.random.key(0)


def location(y: Array) -> None:
    """θ | y is N(Σy/(n + 1), 1/(n + 1))."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    with numpyro.plate("datum", len(y)):
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def conjugate(scale: float = 1.0, shift: float = 0.0, *, blind: bool = False) -> Callable[..., Drawer]:
    """Inference for `location` in closed form, right or wrong by so much; blind to the data it gives the prior."""

    def prepare(key: Array, program: Any, args: Any, num_samples: int) -> Drawer:
        def draw(key: Array, args: Any) -> dict[str, Array]:
            y = args[0]["y"]
            mean, sd = (0.0, 1.0) if blind else (y.sum() / (len(y) + 1), 1 / jnp.sqrt(len(y) + 1))
            return {"theta": mean + sd * (shift + scale * jax.random.normal(key, (num_samples,)))}

        return draw

    return prepare


def test_exact_inference_is_uniform() -> None:
    """The p-values of 5 calibrations: none under 1e-3, at most 2 under 5% (6e-3 false alarms)."""
    p_values = [
        calibrate(jax.random.key(i), location, jnp.zeros(3), infer=conjugate(), num_replications=100).p_value
        for i in range(5)
    ]
    assert sum(p < 0.05 for p in p_values) <= 2
    assert min(p_values) > 1e-3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (conjugate(scale=0.5), "theta are too narrow"),
        (conjugate(scale=2.0), "theta are too wide"),
        (conjugate(shift=0.7), "theta are too high"),
        (conjugate(blind=True), LIKELIHOOD),
    ],
)
def test_wrong_inference_is_flagged(wrong: Callable[..., Drawer], words: str) -> None:
    """The prior in the place of the posterior has uniform ranks of θ; those of the likelihood give it away."""
    found = calibrate(KEY, location, jnp.zeros(3), infer=wrong)
    assert found.verdict == "fail"
    assert words in found.explanation
    assert found.explanation in str(found).replace("\n", " ")
    assert max(map(len, str(found).splitlines())) <= 80


def test_discrete_latents_and_data_in_scans() -> None:
    """A hidden Markov chain: ranks among many ties are uniform, and coverage is nominal (4.5 standard errors)."""

    def chain(y: Array) -> None:
        def step(state: Array, y: Array) -> tuple[Array, None]:
            state = numpyro.sample("state", dist.Categorical(probs=jnp.array([[0.8, 0.2], [0.3, 0.7]])[state]))
            numpyro.sample("y", dist.Normal(1.0 * state, 0.7), obs=y)
            return state, None

        scan(step, jnp.array(0), y)

    found = calibrate(KEY, chain, jnp.zeros(4), infer=exact_inference(), num_replications=400)
    assert found.names == ("state[0]", "state[1]", "state[2]", "state[3]", LIKELIHOOD)
    assert found.ranks.shape == found.pit.shape == (400, 5)
    assert found.p_value > 1e-3
    for level in (0.5, 0.8):
        cover = found.coverage(level)
        assert (np.abs(np.asarray(cover.mean) - level) < 4.5 * np.sqrt(level * (1 - level) / 400)).all()


def test_fits_are_calibrated_where_the_family_holds_the_posterior() -> None:
    found = calibrate(
        KEY, location, jnp.zeros(3), infer=svi_inference(num_steps=300, learning_rate=0.05), num_replications=100
    )
    assert found.p_value > 1e-3  # false alarms: 1e-3
    short = calibrate(KEY, location, jnp.zeros(8), infer=svi_inference(num_steps=2), num_replications=100)
    assert short.verdict == "fail"


def test_the_test_of_uniformity_alarms_as_rarely_as_it_says() -> None:
    """300 sets of uniform numbers: alarms at 1% and 5% at most 3 standard errors above their rates, and Bonferroni's."""
    rng = np.random.default_rng(0)
    found = [Calibration(("a",), np.zeros((200, 1), int), 99, rng.random((200, 1))).p_value for _ in range(300)]
    assert np.mean(np.array(found) < 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)
    assert np.mean(np.array(found) < 0.01) < 0.01 + 3 * np.sqrt(0.01 * 0.99 / 300)


def test_refusals() -> None:
    def rewarded() -> None:
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=0.0)
        bayesrl.reward("r", x)

    def certain() -> None:
        numpyro.sample("y", dist.Normal(0, 1), obs=0.0)

    def subsampled(y: Array) -> None:
        x = numpyro.sample("x", dist.Normal(0, 1))
        with numpyro.plate("datum", len(y), subsample_size=2) as i:
            numpyro.sample("y", dist.Normal(x, 1), obs=y[i])

    def coin(y: Array) -> None:
        fair = numpyro.sample("fair", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(fair, 1), obs=y)

    with pytest.raises(EngineError, match="NUTS moves continuous sites, and 'fair' is discrete"):
        calibrate(KEY, coin, jnp.zeros(()), infer=bayesrl.nuts_inference())
    with pytest.raises(PolicyError, match="reward site 'r'"):
        calibrate(KEY, rewarded)
    with pytest.raises(PolicyError, match="no observed site"):
        calibrate(KEY, lambda: numpyro.sample("x", dist.Normal(0, 1)))
    with pytest.raises(PolicyError, match="no latent site"):
        calibrate(KEY, certain)
    with pytest.raises(PolicyError, match="'datum' is subsampled"):
        calibrate(KEY, subsampled, jnp.zeros(4))
    with pytest.raises(EngineError, match="num_replications=3"):
        calibrate(KEY, location, jnp.zeros(3), num_replications=3)
    with pytest.raises(EngineError, match="'theta' has continuous support"):
        calibrate(KEY, location, jnp.zeros(3), infer=exact_inference())


@pytest.mark.parametrize(
    ("drawn", "words"),
    [
        (lambda args: {}, r"gave no draws of site 'theta'; give \{'theta': an array of shape \(99,\)\}"),
        (lambda args: {"theta": jnp.zeros(3)}, r"draws of shape \(3,\) of site 'theta'"),
        (lambda args: {"theta": jnp.full(99, jnp.nan)}, "drew nan for theta on 20 of 20 data sets"),
        (lambda args: {"theta": np.asarray(args[0]["y"])}, "cannot be traced by JAX"),
    ],
)
def test_inference_that_gives_no_draws_is_refused(drawn: Callable[[Any], Any], words: str) -> None:
    def infer(key: Array, program: Any, args: Any, num_samples: int) -> Drawer:
        return lambda key, args: drawn(args)

    with pytest.raises(EngineError, match=words):
        calibrate(KEY, location, jnp.zeros(3), infer=infer, num_replications=20)


def test_options_of_inference_are_looked_at() -> None:
    with pytest.raises(EngineError, match=r"pass infer=exact_inference\(\)"):
        calibrate(KEY, location, jnp.zeros(3), infer=exact_inference)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="num_steps=0; use a whole number of at least 1"):
        svi_inference(num_steps=0)
    with pytest.raises(EngineError, match="learning_rate=nan"):
        svi_inference(learning_rate=float("nan"))
