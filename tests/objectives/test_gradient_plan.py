"""Which estimator each site gets, and what is refused because it would be biased."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from oracles import ORACLES

import bayesrl
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.errors import ObjectiveError
from bayesrl.jaxprs.dataflow import count_dependent_numbers
from bayesrl.objectives import ForwardKL, ReverseKL
from bayesrl.objectives.gradient_plan import GradientPlan


def plan_of(name: str, objective: ReverseKL) -> GradientPlan:
    oracle = ORACLES[name]()
    args = jax.tree.map(jnp.asarray, oracle.args)
    structure = inspect(jax.random.key(0), oracle.policy, *args)
    programs = Programs(oracle.policy, oracle.guide, structure, args, {})
    plan = objective.prepare(jax.random.key(1), programs, jax.tree.map(jnp.asarray, oracle.params)).plan
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


def arms_of(reward: Any, num: int, num_particles: int) -> tuple[str, ...]:
    def arms() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(num)))
        bayesrl.reward("r", reward(arm))

    structure = inspect(jax.random.key(0), arms)
    programs = Programs(arms, arms, structure, (), {})
    plan = ReverseKL(num_particles).prepare(jax.random.key(1), programs, {}).plan
    assert plan is not None
    return plan.enumerated


def test_what_is_small_is_enumerated_beyond_the_particles() -> None:
    """Not where few particles are asked for, Python is called, or each value costs a large product."""

    def called(arm: Any) -> Any:
        return jax.pure_callback(lambda x: x * np.float32(1), jnp.zeros(()), arm.astype(float))

    matrix = jnp.ones((3000, 3))
    assert arms_of(lambda arm: 1.0 * arm, 1000, 64) == ("arm",)
    assert arms_of(lambda arm: 1.0 * arm, 2049, 64) == ()
    assert arms_of(lambda arm: 1.0 * arm, 1000, 63) == ()
    assert arms_of(called, 65, 64) == ()
    assert arms_of(called, 64, 64) == ("arm",)
    assert arms_of(lambda arm: (matrix @ (arm * jnp.ones(3))).sum(), 1000, 64) == ()
    assert arms_of(lambda arm: (matrix[:20] @ (arm * jnp.ones(3))).sum(), 100, 64) == ("arm",)


def test_only_what_depends_on_the_values_is_counted() -> None:
    values = {"x": jnp.zeros(3)}
    matrix = jnp.ones((50, 3))
    assert count_dependent_numbers(lambda v: (v["x"] * 2).sum(), values) == 4
    assert count_dependent_numbers(lambda v: (matrix * 2) @ v["x"], values) == 150
    steps = count_dependent_numbers(lambda v: jax.lax.scan(lambda c, u: (c + u, c), 0.0, v["x"])[0], values)
    assert steps is not None
    assert 3 <= steps <= 9
    assert count_dependent_numbers(lambda v: jax.pure_callback(np.sum, jnp.zeros(()), v["x"]), values) is None


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
        ("dependent", ReverseKL(enumerated=("c",)), ["'c'", "not an action site", "['a', 'b']"]),
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
    programs = Programs(oracle.policy, oracle.guide, inspect(jax.random.key(0), oracle.policy), (), {})
    with pytest.raises(ObjectiveError, match=r"environment site 'h'.*ReverseKL"):
        ForwardKL().prepare(jax.random.key(0), programs, {})


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
    programs = Programs(oracle.policy, oracle.guide, inspect(jax.random.key(0), oracle.policy), (), {})
    with pytest.raises(ObjectiveError, match="prepare"):
        ReverseKL().draw(jax.random.key(0), {}, programs)


def test_a_jump_in_a_later_density_is_seen() -> None:
    """The number decides by a threshold which coin is thrown next: pathwise gradients would miss it."""

    def policy() -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        y = numpyro.sample("y", dist.Normal(jnp.where(x > 0, 1.0, -1.0), 1.0))
        bayesrl.reward("payoff", y)

    programs = Programs(policy, None, inspect(jax.random.key(0), policy), (), {})
    plan = ReverseKL().prepare(jax.random.key(0), programs, {}).plan
    assert plan is not None
    assert (plan.pathwise, plan.score) == (("y",), ("x",))
