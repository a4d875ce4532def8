"""Which inputs reach an output, and which through a jump."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax

from bayesrl.jaxprs.dataflow import discontinuous_inputs

X, Y = jnp.array(0.3), jnp.array(-0.2)


@jax.custom_jvp
def soft_sign(x: Array) -> Array:
    return jnp.sign(x)


@soft_sign.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return jnp.sign(primals[0]), tangents[0]


def scanned(v: dict[str, Array], body: Any) -> Array:
    return lax.scan(lambda c, _: (body(c, v), None), v["x"], None, length=3)[0]


@pytest.mark.parametrize(
    ("function", "reached", "jumped"),
    [
        (lambda v: v["x"] ** 2, "x", ""),
        (lambda v: jnp.sin(v["x"]) * v["y"], "xy", ""),
        (lambda v: jnp.where(v["x"] > 0, v["y"], 0.0), "xy", "x"),
        (lambda v: jnp.where(v["x"] > 0, 1.0, 0.0) * v["y"], "xy", "x"),
        (lambda v: jnp.floor(v["x"]), "x", "x"),
        (lambda v: jnp.round(v["x"]) + v["y"], "xy", "x"),
        (lambda v: v["x"].astype(int), "x", "x"),
        (lambda v: jnp.sign(v["x"]), "x", "x"),
        (lambda v: jnp.arange(3.0)[jnp.argmax(jnp.stack([v["x"], v["y"], 0.0]))], "xy", "xy"),
        (lambda v: jnp.mod(v["x"], 1.0), "x", "x"),
        (lambda v: lax.stop_gradient(v["x"]) + v["y"], "y", ""),
        (lambda v: jax.scipy.special.logsumexp(jnp.stack([v["x"], v["y"]])), "xy", ""),
        (lambda v: jax.nn.softplus(v["x"]) + jax.nn.log_sigmoid(v["y"]), "xy", ""),
        (lambda v: jnp.maximum(v["x"], v["y"]), "xy", ""),
        (lambda v: jnp.abs(v["x"]) + jax.nn.relu(v["y"]), "xy", ""),
        (lambda v: jnp.clip(v["x"], -1, 1), "x", ""),
        (lambda v: soft_sign(v["x"]), "x", ""),
        (lambda v: lax.cond(v["x"] > 0, lambda y: y, lambda y: -y, v["y"]), "xy", "x"),
        (lambda v: lax.cond(True, lambda y: y, lambda y: -y, v["y"]), "y", ""),
        (lambda v: lax.cond(jnp.array(1) > 0, jnp.floor, lambda y: -y, v["y"]), "y", "y"),
        (lambda v: scanned(v, lambda c, v: c * v["y"]), "xy", ""),
        (lambda v: scanned(v, lambda c, v: jnp.where(c > 0, c, v["y"])), "xy", "xy"),
        (lambda v: scanned(v, lambda c, v: jnp.floor(v["y"]) + c), "xy", "y"),
        (lambda v: lax.while_loop(lambda c: c < 9.0, lambda c: c + 1, v["x"]), "x", "x"),
        (lambda v: jax.jit(jnp.floor)(v["x"]) + v["y"], "xy", "x"),
        (lambda v: jax.vmap(jnp.floor)(v["x"][None]), "x", "x"),
        (lambda v: jax.checkpoint(lambda x: jnp.where(x > 0, x, 0.0))(v["x"]), "x", "x"),
        (lambda v: (v["x"] == 0.3) * v["y"], "y", ""),
        (lambda v: 1.0, "", ""),
    ],
)  # fmt: skip
def test_reaching(function: Any, reached: str, jumped: str) -> None:
    assert discontinuous_inputs(function, {"x": X, "y": Y}) == (set(reached), set(jumped))


def test_a_cond_reports_both_its_branches() -> None:
    def function(v: dict[str, Array]) -> Array:
        return lax.switch(jnp.array(1), [jnp.sin, jnp.floor, jnp.cos], v["x"])

    assert discontinuous_inputs(function, {"x": X}) == ({"x"}, {"x"})
