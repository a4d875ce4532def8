"""Optimisers of a fit: the default, Optax's own, and NumPyro's wrapped as Optax's."""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpyro.optim import _NumPyroOptim

from bayesrl.argument_types import CHECKED_IN_BODY
from bayesrl.errors import FitError
from bayesrl.typing import Params
from bayesrl.value_checks import format_value

type Optimizer = Annotated[optax.GradientTransformation | _NumPyroOptim, CHECKED_IN_BODY]
"""An optimiser of Optax, or of `numpyro.optim`."""


UNPILOTED_RATE = 0.005
"""The rate if no guide suggests one and no pilot can run."""

PILOT_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""The rates that pilots try, from low to high."""


class ScaledAdamState(NamedTuple):
    """State of the default optimiser: its rate, which may differ between lanes, and the state of Adam."""

    rate: Array
    adam: Any


def default_optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam with a cosine decay to 0; at a constant rate, a fit would not profit from the vanishing gradient noise.

    The rate is part of the state, so that one compiled step serves every rate.
    """
    adam = optax.adam(optax.cosine_decay_schedule(1.0, max(num_steps, 1)))

    def start(params: Params) -> ScaledAdamState:
        return ScaledAdamState(jnp.asarray(learning_rate, jnp.float32), adam.init(params))

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, ScaledAdamState]:
        updates, inner = adam.update(gradient, state.adam, params)
        return jax.tree.map(lambda x: state.rate.astype(x.dtype) * x, updates), ScaledAdamState(state.rate, inner)

    return optax.GradientTransformation(start, update)


def as_optimizer(optimizer: Any) -> optax.GradientTransformation | None:
    """Return an Optax optimiser or None as it is, and wrap a NumPyro optimiser as one of Optax.

    Raises:
        FitError: it is none of them.
    """
    if optimizer is None or isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    if callable(optimizer):
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise FitError(f"optimizer={name} is not called yet; pass what it gives, such as optax.adam(0.01)")
    if isinstance(optimizer, _NumPyroOptim):
        return _of_numpyro(optimizer)
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        return optax.GradientTransformation(optimizer.init, optimizer.update)
    if isinstance(optimizer, int | float | np.number):
        raise FitError(f"optimizer={optimizer!r} is a number; pass it as learning_rate={optimizer!r}")
    raise FitError(f"optimizer={format_value(optimizer)} is not an Optax optimiser; pass one such as optax.adam(0.01)")


def check_update(optimizer: optax.GradientTransformation, params: Params) -> None:
    """Refuse an optimiser whose update needs arguments that a step does not have.

    Args:
        optimizer: of a fit.
        params: of all lanes, [lanes, ...].

    Raises:
        FitError: naming the missing argument.
    """
    taking = optax.with_extra_args_support(optimizer)

    def update(params: Params, state: Any) -> Any:
        return taking.update(params, state, params, value=jnp.zeros(()), grad=params, value_fn=lambda _: jnp.zeros(()))

    try:
        state = jax.eval_shape(jax.vmap(optimizer.init), params)
        jax.eval_shape(jax.vmap(update), params, state)
    except TypeError as error:
        told = str(error).partition("\n")[0]
        raise FitError(
            f"the optimiser cannot take a step: {told}; a step gives it gradient, state and parameters, "
            "and value=, grad= and value_fn= of its loss: pass one that asks for no more, such as optax.adam(0.01)"
        ) from error
    kinds = str(jax.tree.structure(state))  # names the type of each part of the state
    if "ScaleByLBFGSState" in kinds and "Linesearch" not in kinds:
        raise FitError(
            "optax.lbfgs(linesearch=None) takes the noise of fresh draws for curvature, and leaps; "
            "pass optax.lbfgs(), which searches along a line of one step's own draws"
        )


def _of_numpyro(optimizer: Any) -> optax.GradientTransformation:
    """Wrap NumPyro's optimiser, which keeps the parameters itself, as one of Optax, which returns their changes."""
    if type(optimizer).__name__ == "Minimize":
        raise FitError(
            "numpyro.optim.Minimize minimises one fixed function by SciPy's BFGS, and the loss of a fit is of fresh "
            "draws at every step; pass numpyro.optim.Adam(0.01), optax.adam(0.01) or optax.lbfgs()"
        )

    def update(gradient: Any, state: Any, params: Any = None, *, value: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        new = optimizer.update(gradient, state, value=value)
        return jax.tree.map(lambda a, b: a - b, optimizer.get_params(new), params), new

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
