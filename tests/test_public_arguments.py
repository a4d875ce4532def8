"""Arguments of every public name: each says what it takes; what nothing would read and what is too large is refused."""

import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import distributions as dist

import bayesrl
from bayesrl import control, lm, objectives
from bayesrl.argument_types import LazyAnnotation, checker
from bayesrl.arguments import AnyWithoutNaN, PositiveNumbers, UnusedOption, _hints, checked, user_code
from bayesrl.control import bandits
from bayesrl.control.environments.tabular_examples import n_chain
from bayesrl.control.exploration.beliefs import BetaBelief
from bayesrl.control.exploration.decisions import best_action_probabilities
from bayesrl.control.learning.agents.base import Agent
from bayesrl.control.learning.models.base import ProgramModel
from bayesrl.control.planning import soft_value_iteration
from bayesrl.errors import BayesRLError, EngineError
from bayesrl.guides import AutoTilt
from bayesrl.lm.transformers.base import Config
from bayesrl.report import training_figure
from benchmarks.robustness_calls import ABSTRACT, GIVEN, RECORDS, public
from benchmarks.robustness_things import Bare, Things

KEY = jax.random.key(0)
HUGE = 10**9
pytestmark = pytest.mark.usefixtures("unchecked")

IN_BODIES = {
    "guide": "a program, a family, or one of NumPyro's, which the body tells apart",
    "optimizer": "of Optax or NumPyro, likewise",
    "tilt.beta": "programs hand it what is traced",
    "reward.value": "it is looked at together with the plates around it",
    "environment.observable": "it has no default, and the body says why",
    "to_datatree.posterior": "a fit, or a run of `learn`",
    "write_report.posteriors": "the same, or several by name",
    "JaxEnvironment.env": "whatever has the methods of one of six libraries",
    "from_gymnasium.environment": "an environment or its id",
    "policy.prompts": "texts, records, conversations or tokens, told apart one by one",
    "read.source": "a path, a data set, a frame or records, told apart",
    "uncertain.posterior": "a posterior, draws, moments or functions, told apart",
    "uncertain.reference": "an item or weights of all items, whose number the posterior has",
    "Tokenizer.core": "of a library that is imported when it is needed",
    "sklearn_pipeline.pipeline": "whatever has the methods of scikit-learn",
    "sklearn_pipeline.label": "a class of whatever type the pipeline has",
}
"""Arguments without a check beside the signature, and why."""


def makers() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Walk public functions, and constructors of what users make."""
    for name, found in public():
        short = name.partition(".")[2]
        # The shapes of models ask the same of their own fields, whoever makes them.
        if short in RECORDS + ABSTRACT + GIVEN + ("PlanResult",) or (
            isinstance(found, type) and issubclass(found, Config)
        ):
            continue
        if not isinstance(found, type):
            yield short, found
        elif "__init__" in vars(found):
            yield short, found.__init__  # type: ignore[misc]


def test_every_argument_of_a_public_name_says_what_it_takes() -> None:
    count, unsaid, said_in_vain = 0, [], set(IN_BODIES)
    for name, fn in makers():
        hints = _hints(fn)
        for param in inspect.signature(fn).parameters.values():
            if param.name == "self" or param.name[0] == "_" or param.kind in (param.VAR_POSITIONAL, param.VAR_KEYWORD):
                continue
            count += 1
            if hasattr(fn, "__gated__") and param.name in hints and checker(hints[param.name]) is not None:
                continue
            known = {param.name, f"{name}.{param.name}"} & set(IN_BODIES)
            said_in_vain -= known
            unsaid += [] if known else [f"{name}.{param.name}"]
    assert count > 300
    assert not unsaid, unsaid
    assert not said_in_vain, said_in_vain


def bandit() -> None:
    """Draw an arm."""
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
    bayesrl.reward("payoff", 1.0 * arm)


@pytest.fixture(scope="module")
def things() -> Things:
    return Things()


# ---- kinds of values ---------------------------------------------------------------------------


def test_numbers_above_zero_values_without_nan_and_what_other_modules_hold() -> None:
    @checked(EngineError)
    def take(
        size: PositiveNumbers = 1.0,
        anything: AnyWithoutNaN = None,
        bandit: Any = None,
    ) -> Any:
        return size

    for good in (1, 1e38, [0.5, 2], np.array([[1, 2]]), jnp.ones(2, jnp.bfloat16), 1e-30):
        take(good)
    for bad in (
        0,
        -1.0,
        1e308,
        1e39,
        np.nan,
        [1.0, 0.0],
        np.array([np.inf]),
        1e-320,
        True,
        "1",
        None,
        KEY,
        [[1], [1, 2]],
    ):
        with pytest.raises(EngineError, match=r"take got size=.*; use a number above 0, or an array of such"):
            take(bad)
    for good in (None, "nan", {"a": [1.0, np.arange(3)]}, KEY, object(), np.array(["nan"]), np.inf, bandit):
        take(anything=good)
    for bad in (np.nan, [1.0, np.nan], {"a": jnp.array([jnp.nan])}, (np.float32("nan"),), np.array([[0.0, np.nan]])):
        with pytest.raises(EngineError, match=r"take got anything=.*; use what holds no nan"):
            take(anything=bad)


def test_an_annotation_may_stand_elsewhere() -> None:
    agent = control.KLControlAgent(0.5)
    bayesrl.LearningProblem(control.deep_sea(size=3), agent, control.thompson())
    assert LazyAnnotation("bayesrl.control.learning.agents.base", "Agent")() is Agent
    for name, bad in (
        *(("environment", bad) for bad in (np.nan, None, 3, np.array([np.nan]), KEY, dict, [control.deep_sea(size=3)])),
        *(("agent", bad) for bad in (np.nan, None, control.KLControlAgent, control.thompson(), "kl_control", KEY)),
        *(("exploration", bad) for bad in (np.nan, control.thompson, dict, "thompson", 0.1, KEY, dist.Normal())),
    ):
        given: dict[str, Any] = {"environment": control.deep_sea(size=3), "agent": agent, name: bad}
        if (name, bad) == ("environment", dict):  # a function that makes an environment is one, whatever it makes
            continue
        with pytest.raises(BayesRLError, match=f"LearningProblem got {name}=.*; use "):
            bayesrl.LearningProblem(**given)


def test_options_of_a_problem_are_those_of_what_runs_it() -> None:
    bayesrl.Problem(bandit, beta=1.0, fit_options={"num_steps": 3, "guide": AutoTilt()})
    bayesrl.LearningProblem(control.deep_sea(size=3), control.KLControlAgent(0.5), learn_options={"confidence": 0.9})
    for bad in ({"steps": 3}, {"beta": 1.0}, {"a": 1}, {"directory": "x"}, {"key": KEY}):
        with pytest.raises(
            BayesRLError, match=r"got fit_options=.*; use a dictionary of options of `fit`, but for beta"
        ):
            bayesrl.Problem(bandit, beta=1.0, fit_options=bad)
    for bad in ({"num_episodes": 3}, {"agent": 1}, {"tolerence": 0.1}):
        with pytest.raises(BayesRLError, match=r"got learn_options=.*; use a dictionary of options of `learn`"):
            bayesrl.LearningProblem(control.deep_sea(size=3), control.KLControlAgent(0.5), learn_options=bad)


def test_functions_of_users_that_fail_are_told_with_their_own_words() -> None:
    for wrong in (KeyError("gone"), ZeroDivisionError("by zero\nand more"), AttributeError("no"), RuntimeError()):
        told = pytest.raises(EngineError, match=rf"^exact failed: {type(wrong).__name__}: .*; mend it$")
        with told as caught, user_code("exact", EngineError, "mend it"):
            raise wrong
        assert caught.value.__cause__ is wrong
    with pytest.raises(KeyboardInterrupt), user_code("exact", EngineError, "mend it"):
        raise KeyboardInterrupt
    with pytest.raises(bayesrl.errors.PolicyError), user_code("exact", EngineError, "mend it"):
        raise bayesrl.errors.PolicyError("ours")


def test_functions_of_users_are_asked_so(things: Things) -> None:
    for call, told in (
        (lambda: bayesrl.evidence(KEY, things.posterior, optimum=dict), "optimum failed: TypeError"),
        (lambda: bayesrl.fit(KEY, bandit, beta=1.0, num_steps=1, source=lambda *a: None), "source gave a NoneType"),
    ):
        with pytest.raises(BayesRLError, match=told):
            call()


def test_an_optimum_is_one_number_for_each_temperature(things: Things) -> None:
    for good in (0.5, [0.5], np.array(0.5), np.array([[0.5]])):
        training_figure(things.posterior, good)
    for bad in ([], (), [1.0, 2.0], np.full((2, 2, 2), 0.5), np.array([])):
        with pytest.raises(BayesRLError, match=r"optimum has shape .*; pass a number for each β"):
            training_figure(things.posterior, bad)
    with pytest.raises(BayesRLError, match=r"optimum=1e\+308; use a finite number"):
        training_figure(things.posterior, 1e308)


# ---- options that nothing would read -----------------------------------------------------------

MADE = object.__new__(bayesrl.Evidence)
TEXT_OPTIONS: dict[str, Any] = {"num_steps": 1, "width": 4, "depth": 1}


@pytest.mark.parametrize(
    ("call", "option"),
    [
        (lambda t: bayesrl.fit(KEY, bandit, beta=1.0, optimizer=optax.sgd(0.1), learning_rate=0.1), "learning_rate"),
        (lambda t: bayesrl.fit(KEY, bandit, start_beta=1.0), "start_beta"),
        (lambda t: bayesrl.load("nowhere", guide=AutoTilt()), "guide"),
        (lambda t: bayesrl.load("nowhere", objective=objectives.ReverseKL()), "objective"),
        (lambda t: bayesrl.evidence(KEY, t.posterior, optimum=lambda b: 1.0, method="rejection"), "method"),
        (lambda t: bayesrl.evidence(KEY, t.posterior, optimum=lambda b: 1.0, reward_bound=3.0), "reward_bound"),
        (lambda t: bayesrl.diagnose(KEY, t.posterior, optimum=lambda b: 1.0, max_count=7), "max_count"),
        (lambda t: bayesrl.frontier(KEY, t.posterior, evidence=MADE, num_samples=512), "num_samples"),
        (lambda t: bayesrl.frontier(KEY, t.posterior, evidence=MADE, method="nuts"), "method"),
        (lambda t: control.BayesianAgent(t.model, num_steps=7), "num_steps"),
        (lambda t: control.BayesianAgent(t.model, update_every=7), "update_every"),
        (lambda t: control.BayesianAgent(ProgramModel(bandit), num_steps=7), "num_steps"),
        (
            lambda t: control.evaluate_off_policy(
                t.logged, np.full((4, 2), 0.5), method="ips", values=np.zeros((4, 2))
            ),
            "values",
        ),
        (lambda t: control.GymnasiumSource(lambda: None, options={"a": 1}), "options"),
        (lambda t: AutoTilt(tilt="constant", hidden=7), "hidden"),
        (lambda t: AutoTilt(tilt="table", recurrent=False, hidden=7), "hidden"),
        (
            lambda t: lm.CausalLMDistribution(
                t.writer.model, jnp.array([1]), num_steps=1, support_model=t.writer.model
            ),
            "support_model",
        ),
        (lambda t: lm.train_small_lm(KEY, "a", "ab ab", t.tokenizer, answer="b", **TEXT_OPTIONS), "answer"),
        (lambda t: lm.train_small_lm(KEY, "a", "ab ab", t.tokenizer, room_for=["a"], **TEXT_OPTIONS), "room_for"),
        (lambda t: lm.train_small_lm(KEY, "a", t.records, t.tokenizer, length=7, **TEXT_OPTIONS), "length"),
    ],
)
def test_an_option_that_nothing_would_read_is_refused(
    call: Callable[[Things], Any], option: str, things: Things
) -> None:
    with pytest.raises(BayesRLError, match=rf" got {option}=.*, which nothing would read: .*; leave it out"):
        call(things)


def test_what_is_read_stays() -> None:
    AutoTilt(tilt="table", hidden=7)  # for the summary of a scan
    AutoTilt(tilt="constant", hidden=32)  # its default
    control.BayesianAgent(bandit, num_steps=7, update_every=2)
    control.BayesianAgent(control.LinearValues(num_actions=2), inference="fit", num_steps=7)
    assert "UnusedOption" in repr(UnusedOption("a", lambda given: True, "b"))


# ---- sizes -------------------------------------------------------------------------------------

SIZES: list[Callable[[Things], Any]] = [
    lambda t: t.posterior.sample(KEY, HUGE * 2),
    lambda t: t.posterior.estimate(KEY, HUGE * 2),
    lambda t: t.posterior.totals(KEY, HUGE * 2),
    lambda t: t.exact.resample(KEY, HUGE * 2),
    lambda t: bayesrl.coverage(KEY, t.posterior, t.exact, num_samples=HUGE * 2),
    lambda t: bayesrl.importance(KEY, wide, beta=1.0, num_samples=HUGE),
    lambda t: bayesrl.fit(KEY, bandit, beta=1.0, num_restarts=HUGE),
    lambda t: bayesrl.fit(
        KEY, bandit, beta=1.0, objective=objectives.ReverseKL(num_particles=HUGE * 2), num_restarts=9
    ),
    lambda t: bayesrl.fit(KEY, bandit, beta=np.linspace(1.0, 2.0, 10**5), num_restarts=10**5),
    lambda t: bayesrl.calibrate(KEY, latent, jnp.zeros(2), num_replications=HUGE),
    lambda t: bayesrl.calibrate(KEY, latent, jnp.zeros(2), num_samples=HUGE),
    lambda t: bayesrl.enumerate_posterior(many, beta=1.0, max_count=2**31 - 1),
    lambda t: control.deep_sea(size=HUGE),
    lambda t: control.river_swim(num_states=HUGE),
    lambda t: control.TabularModel(num_states=10**5, num_actions=2, horizon=2),
    lambda t: control.TabularModel(num_states=3, num_actions=2, horizon=HUGE * 2),
    lambda t: soft_value_iteration(t.mdp.replace(horizon=HUGE * 2), 0.1),
    lambda t: control.EnsembleValues(num_actions=2, hidden=HUGE),
    lambda t: control.EnsembleValues(num_actions=2, num_members=HUGE),
    lambda t: control.LastLayerValues(num_actions=2, depth=HUGE),
    lambda t: control.NetworkPolicy(hidden=HUGE),
    lambda t: control.GymnasiumSource("CartPole-v1", num_envs=HUGE),
    lambda t: control.GymnasiumSource("CartPole-v1", num_envs=10**4, window=10**7),
    lambda t: best_action_probabilities(KEY, BetaBelief(jnp.ones(2), jnp.ones(2)), num_samples=HUGE * 2),
    lambda t: bandits.play_bandit(KEY, bandits.BernoulliArms(2), control.random(), num_steps=HUGE),
    lambda t: bandits.play_bandit(KEY, bandits.BernoulliArms(HUGE), control.random(), num_steps=1),
    lambda t: lm.GPT2.init(KEY, lm.GPT2Config(vocab_size=HUGE * 2)),
    lambda t: lm.GPT2.init(KEY, lm.GPT2Config(vocab_size=10, depth=HUGE)),
    lambda t: lm.GPT2.init(KEY, lm.GPT2Config(vocab_size=10, width=12 * 10**6)),
    lambda t: lm.BertClassifier.init(KEY, lm.BertConfig(inner=HUGE * 2)),
]
MOST: list[Callable[[int], Any]] = [
    lambda n: objectives.ReverseKL(num_particles=n),
    lambda n: n_chain(num_states=n),
    lambda n: control.Rollout(control.CartPole(), n),
    lambda n: bandits.GaussianArms(num_arms=n),
    lambda n: lm.LoRA(rank=n),
    lambda n: lm.rewards.text_reward(len, num_workers=n),
    lambda n: lm.GPT2Config(vocab_size=n),
    lambda n: bayesrl.svi_inference(num_steps=n),
    lambda n: AutoTilt(max_table=n),
    lambda n: control.JaxEnvironment(Bare(), dist.Bernoulli(0.5), None, num_observations=n),
]


def wide() -> None:
    """Draw many numbers."""
    numpyro.sample("x", dist.Normal(jnp.zeros(1000), 1.0).to_event(1))
    bayesrl.reward("r", 0.0)


def many() -> None:
    """Have 2³⁰ assignments that interact."""
    flips = [numpyro.sample(f"flip{i}", dist.Bernoulli(0.5)) for i in range(30)]
    bayesrl.reward("r", 1.0 * jnp.prod(jnp.stack(flips)))


def latent(y: Any) -> None:
    """Infer a mean."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    with numpyro.plate("datum", len(y)):
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@pytest.mark.parametrize("place", range(len(SIZES)))
def test_what_would_not_fit_is_refused_before_anything_is_made(
    place: int, things: Things, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bayesrl.arguments._memory", lambda: 8e9)
    things.posterior, things.exact, things.mdp  # noqa: B018  (made before the clock runs)
    start = time.perf_counter()
    with pytest.raises(BayesRLError, match=r"would take .* GB of memory, and there are .*; (use|pass|ask|make)"):
        SIZES[place](things)
    assert time.perf_counter() - start < 10.0  # most take milliseconds; a program is read first


@pytest.mark.parametrize("make", MOST)
def test_a_count_that_no_array_could_have_is_refused_by_its_own_largest(make: Callable[[int], Any]) -> None:
    for count in (10**12, 2**31, 10**400):
        with pytest.raises(
            BayesRLError, match=r"; use a whole number of at most \d+|; use a whole number from \d+ to \d+"
        ):
            make(count)
