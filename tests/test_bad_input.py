"""Bad input meets an error that names the site, the value and the remedy."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO

import bayesrl
from bayesrl.errors import FitError, GuideError, ObjectiveError, PolicyError
from bayesrl.objectives import ForwardKL, ReverseKL

KEY = jax.random.key(0)


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
    bayesrl.reward("payoff", 1.0 * arm)


def rewarding(value: Callable[[Any], Any]) -> Callable[[], None]:
    def policy() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        bayesrl.reward("payoff", value(arm))

    return policy


def in_plate(value: Callable[[Any], Any]) -> Callable[[], None]:
    def policy() -> None:
        with numpyro.plate("image", 5):
            arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
            bayesrl.reward("payoff", value(arm))

    return policy


def gaussian() -> None:
    x = numpyro.sample("x", dist.Normal())
    bayesrl.reward("r", -(x**2))


def jumping() -> None:
    x = numpyro.sample("x", dist.Normal())
    bayesrl.reward("r", jnp.where(x > 1, 1.0, 0.0))


def bounded() -> None:
    x = numpyro.sample("x", dist.Uniform(0.0, 1.0))
    bayesrl.reward("r", x)


def of_nan(fn: Callable[[Any], dist.Distribution]) -> Callable[[], None]:
    def policy() -> None:
        bayesrl.reward("r", 1.0 * numpyro.sample("x", fn(jnp.log(-jnp.ones(())))))

    return policy


def windy() -> None:
    wind = bayesrl.environment("wind", dist.Bernoulli(0.5), observable=True)
    arm = numpyro.sample("arm", dist.Bernoulli(0.5))
    bayesrl.reward("r", 1.0 * arm * wind)


def twins() -> None:
    numpyro.sample("arm", dist.Bernoulli(0.5))
    numpyro.sample("arm", dist.Bernoulli(0.5))


def lonely() -> None:
    numpyro.sample("arm", dist.Bernoulli(0.5))


def unobserved() -> None:
    numpyro.sample("theta", dist.Normal())
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=1.0)


def guide_of(**sites: Any) -> Callable[[], None]:
    def guide() -> None:
        numpyro.param("unused", jnp.zeros(()))
        for name, distribution in sites.items():
            numpyro.sample(name, distribution)

    return guide


def holding() -> None:
    numpyro.sample("arm", dist.Categorical(logits=numpyro.param("logits", jnp.zeros(3))), obs=jnp.array(1))


def named_like_its_plate() -> None:
    with numpyro.plate("arm", 3):
        arm = numpyro.sample("arm", dist.Bernoulli(0.5))
        bayesrl.reward("payoff", 1.0 * arm)


def tilting_nature() -> None:
    p = numpyro.param("p", jnp.asarray(1.0))
    bayesrl.environment("wind", dist.Bernoulli(logits=p), observable=True)
    numpyro.sample("arm", dist.Bernoulli(0.5))


FITS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (bandit, {"beta": 0.0}, PolicyError, r"fit got beta=0\.0; use a temperature.*a number above 0"),
    (bandit, {"beta": -1.0}, PolicyError, r"beta=-1\.0; use a temperature"),
    (bandit, {"beta": float("nan")}, PolicyError, "beta=nan; use a temperature"),
    (bandit, {"beta": 10**400}, PolicyError, "beta=1000.*0; use a temperature"),
    (bandit, {"beta": jnp.array([1.0, -2.0])}, PolicyError, r"beta=an array of shape \(2,\).*or an array of them"),
    (bandit, {}, PolicyError, r"'payoff'.*needs a temperature: pass beta"),
    (unobserved, {"beta": 1.0}, PolicyError, "no reward site.*leave beta out"),
    (lonely, {}, PolicyError, "neither a reward nor an observed site.*add bayesrl.reward"),
    (twins, {}, PolicyError, r"'arm' appears 2 times.*its own name"),
    (named_like_its_plate, {"beta": 1.0}, PolicyError, "'arm' bears the name of a plate; give every site and plate"),
    (
        rewarding(lambda arm: jnp.zeros(3) + arm),
        {"beta": 1.0},
        PolicyError,
        r"'payoff' has shape \(3,\).*no plate.*sum it",
    ),
    (rewarding(lambda arm: 1j * arm), {"beta": 1.0}, PolicyError, "'payoff' is complex"),
    (rewarding(lambda arm: 10**400), {"beta": 1.0}, PolicyError, "'payoff' got 1000.*which is not a number"),
    (
        rewarding(lambda arm: jax.random.key(0)),
        {"beta": 1.0},
        PolicyError,
        "'payoff' holds key<fry>, which is no number",
    ),
    (rewarding(lambda arm: jnp.nan * arm), {"beta": 1.0}, PolicyError, "'payoff' returned nan for 64 of 64"),
    (rewarding(lambda arm: jnp.where(arm < 3, jnp.inf, 0)), {"beta": 1.0}, PolicyError, "'payoff' returned inf"),
    (
        rewarding(lambda arm: jnp.where(arm < 3, -jnp.inf, 0)),
        {"beta": 1.0},
        ObjectiveError,
        "'payoff' returned -inf.*ForwardKL",
    ),
    (in_plate(lambda arm: 1.0), {"beta": 1.0}, PolicyError, r"'payoff'.*'image' \(size 5\) and would count 5 times"),
    (in_plate(lambda arm: 1.0 * arm[::-1]), {"beta": 1.0}, PolicyError, "'image'"),
    (bandit, {"beta": 1.0, "guide": guide_of()}, GuideError, "misses action site 'arm'"),
    (
        bandit,
        {"beta": 1.0, "guide": guide_of(arm=dist.Categorical(logits=jnp.zeros(3)), leg=dist.Normal())},
        GuideError,
        "adds site 'leg'.*remove it",
    ),
    (bandit, {"beta": 1.0, "guide": guide_of(arm=dist.Categorical(logits=jnp.zeros(9)))}, GuideError, "'arm'.*support"),
    (
        bandit,
        {"beta": 1.0, "guide": guide_of(arm=dist.Categorical(logits=jnp.array([0.0, 0.0, 0.0, -30.0])))},
        GuideError,
        "leaves the prior's support at site 'arm': it may draw 3, which the prior, with values 0 to 2, cannot",
    ),
    (bandit, {"beta": 1.0, "guide": holding}, GuideError, r"holds action site 'arm' at a value.*leave obs out"),
    (bounded, {"beta": 1.0, "guide": guide_of(x=dist.Normal())}, GuideError, "leaves the prior's support at site 'x'"),
    *(
        (of_nan(fn), options, PolicyError, "site 'x' of the policy has a parameter or density that is nan")
        for fn, options in (
            (lambda nan: dist.Normal(nan, 1.0), {"beta": 1.0, "guide": guide_of(x=dist.Normal())}),
            (lambda nan: dist.Normal(0.0, nan), {"beta": 1.0, "guide": guide_of(x=dist.Normal())}),
            (lambda nan: dist.Bernoulli(logits=nan), {"beta": 1.0, "guide": guide_of(x=dist.Bernoulli(0.5))}),
            (lambda nan: dist.Categorical(logits=jnp.array([0.0, nan])), {"beta": 1.0}),
            (lambda nan: dist.Normal(nan, 1.0), {"beta": 1.0}),
        )
    ),
    (
        bandit,
        {"beta": 1.0, "guide": guide_of(arm=dist.Categorical(logits=jnp.zeros((2, 3))))},
        GuideError,
        r"'arm' with shape \(2,\), the policy with \(\)",
    ),
    (windy, {"beta": 1.0, "guide": tilting_nature}, GuideError, "'wind' from another distribution"),
    (
        bandit,
        {"beta": 1.0, "objective": ReverseKL(estimator="pathwise")},
        ObjectiveError,
        "site 'arm'.*estimator='auto'",
    ),
    (jumping, {"beta": 1.0, "objective": ReverseKL(estimator="pathwise")}, ObjectiveError, "biased at site 'x'"),
    (jumping, {"beta": 1.0, "objective": Trace_ELBO()}, ObjectiveError, "Trace_ELBO would be biased at site 'x'"),
    (bandit, {"beta": 1.0, "objective": Trace_ELBO()}, ObjectiveError, "Trace_ELBO has no gradient for site 'arm'"),
    (bandit, {"beta": 1.0, "objective": RenyiELBO()}, ObjectiveError, "RenyiELBO has no gradient for site 'arm'"),
    (gaussian, {"beta": 1.0, "objective": TraceEnum_ELBO()}, ObjectiveError, "TraceEnum_ELBO gives wrong gradients"),
    (windy, {"beta": 1.0, "objective": ForwardKL()}, ObjectiveError, "'wind'.*nature"),
    (
        bandit,
        {"beta": 1.0, "objective": ReverseKL(num_particles=1, enumerated=())},
        ObjectiveError,
        "num_particles=1.*'arm'",
    ),
    (
        bandit,
        {"beta": 1.0, "objective": ReverseKL(enumerated=("leg",))},
        ObjectiveError,
        "'leg', which is not an action site",
    ),
    (bandit, {"beta": 1.0, "num_steps": 0}, FitError, "num_steps=0; use a whole number of at least 1"),
    (bandit, {"beta": 1.0, "num_steps": True}, FitError, "num_steps=True; use a whole number"),
    (bandit, {"beta": 1.0, "num_restarts": 0}, FitError, "num_restarts=0"),
    (bandit, {"beta": 1.0, "start_beta": 0.5}, FitError, "start_beta=0.5; use a number .* at least beta=1"),
    (bandit, {"start_beta": 2.0}, FitError, "without beta= there is nothing to fall to"),
    (bandit, {"beta": 1.0, "tolerance": -1.0}, FitError, r"tolerance=-1\.0"),
    (bandit, {"beta": 1.0, "num_stepz": 5}, TypeError, "num_stepz"),
]


@pytest.mark.parametrize(("policy", "options", "error", "message"), FITS)
def test_fit_refuses(policy: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        bayesrl.fit(KEY, policy, **{"progress": False, "num_steps": 2, **options})


def test_log_evidence_of_a_mini_batch_is_refused() -> None:
    def digits() -> None:
        with numpyro.plate("image", 6, subsample_size=2) as i:
            guess = numpyro.sample("guess", dist.Categorical(logits=jnp.zeros(3)))
            bayesrl.reward("right", 1.0 * (guess == i % 3))

    for engine in (
        lambda policy: bayesrl.enumerate_posterior(policy, beta=1.0),
        lambda policy: bayesrl.importance(KEY, policy, beta=1.0, num_samples=2000),
    ):
        with pytest.raises(bayesrl.errors.EngineError, match="'image'"):
            engine(digits)
        whole = engine(bayesrl.full_data(digits))
        # Each image has one right answer of three; importance is off by at most 5 standard errors of about .01.
        np.testing.assert_allclose(whole.log_evidence.mean, np.log((np.e + 2) / 3), atol=0.06)


def test_nan_steps_are_counted_and_end_the_fit() -> None:
    def rarely(threshold: float) -> Callable[[], None]:
        def policy() -> None:
            x = numpyro.sample("x", dist.Normal())
            bayesrl.reward("r", jnp.where(x > threshold, jnp.nan, 0.0))

        return policy

    # One draw in 741 is NaN, so of 400 steps with 8 draws each 4.3 are skipped in the mean: none with
    # probability .013, over 40 never. (The key is fixed, and so is the outcome.)
    objective = ReverseKL(num_particles=8)
    fitted = bayesrl.fit(KEY, rarely(3.0), beta=1.0, objective=objective, num_steps=400, progress=False)
    skipped = int(fitted.history["skipped"][-1, 0])
    assert 0 < skipped < 40
    assert np.isfinite(fitted.history["objective"]).all()
    # One draw in 107: more than half of the steps with 128 draws fail, if the first look has let the policy pass.
    for seed in range(20):
        key, many = jax.random.key(seed), ReverseKL(num_particles=128)
        with pytest.raises((FitError, PolicyError)) as caught:
            bayesrl.fit(key, rarely(2.35), beta=1.0, objective=many, num_steps=400, progress=False)
        if caught.type is FitError:
            break
    assert "steps had a loss or gradient that was not finite" in str(caught.value)
    assert "reward site 'r' was not finite" in str(caught.value)


MISTYPED = {
    "environment('wind', dist.Bernoulli(0.5), observable=None)": "'wind' got observable=None; say True where the agent",
    "environment('wind', dist.Bernoulli(0.5), observable=1)": "'wind' got observable=1; say True where the agent",
    "reward('payoff', 'much')": "'payoff' got 'much', which is not a number",
    "reward('payoff', None)": "'payoff' got None, which is not a number",
    "fit(key, bandit, beta=1.0, guide=3)": "guide=3 is neither a NumPyro program nor a family",
    "fit(key, bandit, beta=1.0, guide=AutoTilt)": "guide=AutoTilt is a class; pass an instance of it",
    "fit(key, bandit, beta=1.0, optimizer=0.01)": "optimizer=0.01 is a number; pass it as learning_rate=0.01",
    "fit(key, bandit, beta=1.0, callback=3)": "callback=3; use a function, or None",
    "fit(key, bandit, beta=1.0, source=3)": "source=3; use a function, or None",
    "fit(key, bandit, beta=1.0, tolerance='small')": "tolerance='small'; use a number above 0, or None",
    "ReverseKL(2.5)": "ReverseKL got num_particles=2.5; use a whole number",
    "ForwardKL('many')": "ForwardKL got num_particles='many'; use a whole number of at least 2",
    "FDivergence('kl')": "FDivergence got generator='kl'; use 'reverse_kl', 'forward_kl', 'jensen_shannon', 'total_variation'",
    "importance(key, bandit, beta=1.0, num_samples=2.5)": "importance got num_samples=2.5; use a whole number of at least 2",
    "fitted.sample(key, -1)": "num_samples=-1; use a whole number",
    "fitted.estimate(key, 2.5)": "Posterior.estimate got num_samples=2.5; use a whole number of at least 2",
    "fitted.select(restart=True)": "restart=True; use 'best' or 'mixture' or a whole number",
    "fitted.select(beta='low')": "beta='low'; use a number above 0",
    "fitted.log_prob({'arm': 1})": "sites={'arm': 1}; use a dictionary of which all values are an array, and not 1",
    "fit(key, bandit, beta=1.0, objective='elbo')": "objective='elbo'; use an Objective or an ELBO",
    "fit(key, bandit, beta='hot')": "beta='hot'; use a temperature in reward units per nat: a number above 0",
    "fit(key, 'bandit', beta=1.0)": "fit got policy='bandit'; use a NumPyro program",
    "fit(0, bandit, beta=1.0)": "key=0; use a JAX random key: jax.random.key(seed)",
    "fit(key, bandit, beta=1.0, num_steps=2.5)": "num_steps=2.5; use a whole number of at least 1",
}


def test_wrong_types_are_told_in_our_words() -> None:
    """Run apart from the type checker of the tests, which would speak first."""
    attempts = "\n".join(
        f"try:\n    {call}\nexcept errors.BayesRLError as error:\n    print(error)\nelse:\n    print('accepted')"
        for call in MISTYPED
    )
    code = (
        "import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist\n"
        "from bayesrl import environment, errors, fit, importance, reward\n"
        "from bayesrl.guides import AutoTilt\n"
        "from bayesrl.objectives import FDivergence, ForwardKL, ReverseKL\n"
        "key = jax.random.key(0)\n"
        "def bandit():\n    reward('payoff', 1.0 * numpyro.sample('arm', dist.Bernoulli(0.5)))\n"
        "fitted = fit(key, bandit, beta=1.0, num_steps=1, progress=False)\n"
    )
    result = subprocess.run([sys.executable, "-c", code + attempts], capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    assert len(lines) == len(MISTYPED), result.stderr
    for (call, message), line in zip(MISTYPED.items(), lines, strict=True):
        assert message in line, f"{call} said: {line}"
