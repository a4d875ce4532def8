"""Which estimator each site gets, and what is refused because it would be biased."""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from oracles import ORACLES

import bayesrl
from bayesrl.core.pairing import Pair
from bayesrl.core.structure import inspect
from bayesrl.errors import ObjectiveError
from bayesrl.objectives import ForwardKL, ReverseKL
from bayesrl.objectives.plan import Plan


def plan_of(name: str, objective: ReverseKL) -> Plan:
    oracle = ORACLES[name]()
    args = jax.tree.map(jnp.asarray, oracle.args)
    structure = inspect(jax.random.key(0), oracle.policy, *args)
    pair = Pair(oracle.policy, oracle.guide, structure, args, {})
    plan = objective.prepare(jax.random.key(1), pair, jax.tree.map(jnp.asarray, oracle.params)).plan
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    ("name", "pathwise", "score", "nature", "enumerated"),
    [
        ("flat", (), (), (), ("arm",)),
        ("dependent", (), (), (), ("a", "b")),
        ("contexts", (), (), (), ("arm",)),
        ("chain", (), ("action",), (), ()),
        ("chain_with_nature", (), ("action",), (), ()),
        ("observable", (), ("arm",), (), ()),
        ("interacting", (), ("bits",), (), ()),
        ("nested", (), ("bits",), (), ()),
        ("gaussian", ("x",), (), (), ()),
        ("walk", ("move",), (), (), ()),
        ("mixed", ("x",), ("z", "b"), (), ()),
        ("jump", (), ("x",), (), ()),
        ("answered", ("x",), (), ("h",), ()),
    ],
)
def test_the_plan(name: str, pathwise: Any, score: Any, nature: Any, enumerated: Any) -> None:
    plan = plan_of(name, ReverseKL(16))
    assert (plan.pathwise, plan.score, plan.nature, plan.enumerated) == (pathwise, score, nature, enumerated)


def test_few_particles_do_not_enumerate_by_themselves() -> None:
    assert plan_of("dependent", ReverseKL(5)).enumerated == ()
    assert plan_of("dependent", ReverseKL(6)).enumerated == ("a", "b")


@pytest.mark.parametrize(
    ("name", "objective", "parts"),
    [
        ("flat", ReverseKL(estimator="pathwise", enumerated=()), ["'arm'", "Categorical", "estimator='auto'"]),
        ("mixed", ReverseKL(estimator="pathwise"), ["'z'", "estimator='auto'"]),
        ("jump", ReverseKL(estimator="pathwise"), ["'x'", "jumps", "estimator='auto'"]),
        ("chain", ReverseKL(1), ["num_particles=1", "'action'", "baseline='none'"]),
        ("gaussian", ReverseKL(enumerated=("x",)), ["'x'", "finite support"]),
        ("chain", ReverseKL(enumerated=("action",)), ["'action'", "outside scans"]),
        ("nested", ReverseKL(enumerated=("bits",)), ["'bits'", "separate problems"]),
        ("dependent", ReverseKL(enumerated=("a",)), ["last action sites", "['a', 'b']"]),
        ("dependent", ReverseKL(enumerated=("c",)), ["'c'", "no action site", "['a', 'b']"]),
        ("hidden", ReverseKL(enumerated=("arm",)), ["nature draws after site 'arm'", "enumerated=()"]),
    ],
)
def test_refusals(name: str, objective: ReverseKL, parts: list[str]) -> None:
    with pytest.raises(ObjectiveError) as caught:
        plan_of(name, objective)
    for part in parts:
        assert part in str(caught.value)


def test_forward_kl_refuses_nature() -> None:
    oracle = ORACLES["hidden"]()
    pair = Pair(oracle.policy, oracle.guide, inspect(jax.random.key(0), oracle.policy), (), {})
    with pytest.raises(ObjectiveError, match=r"environment site 'h'.*ReverseKL"):
        ForwardKL().prepare(jax.random.key(0), pair, {})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: ReverseKL(0), "num_particles=0"),
        (lambda: ReverseKL(estimator="path"), "estimator='path'"),  # type: ignore[arg-type]
        (lambda: ReverseKL(baseline="mean"), "baseline='mean'"),  # type: ignore[arg-type]
        (lambda: ForwardKL(1), "num_particles=1"),
        (lambda: ForwardKL(prior_fraction=1.0), "prior_fraction=1.0"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, part: str) -> None:
    with pytest.raises(ObjectiveError, match=part):
        make()


def test_an_objective_must_be_prepared() -> None:
    oracle = ORACLES["flat"]()
    pair = Pair(oracle.policy, oracle.guide, inspect(jax.random.key(0), oracle.policy), (), {})
    with pytest.raises(ObjectiveError, match="prepare"):
        ReverseKL().draw(jax.random.key(0), {}, pair)


def test_a_jump_in_a_later_density_is_seen() -> None:
    """The number decides by a threshold which coin is thrown next: pathwise gradients would miss it."""

    def policy() -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        y = numpyro.sample("y", dist.Normal(jnp.where(x > 0, 1.0, -1.0), 1.0))
        bayesrl.reward("payoff", y)

    pair = Pair(policy, None, inspect(jax.random.key(0), policy), (), {})
    plan = ReverseKL().prepare(jax.random.key(0), pair, {}).plan
    assert plan is not None
    assert (plan.pathwise, plan.score) == (("y",), ("x",))
