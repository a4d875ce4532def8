"""Questions that cannot be asked are refused before anything is computed, with the value and the remedy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesrl.certainty import asking
from bayesrl.errors import BayesRLError
from bayesrl.posterior import Posterior

FIT = Posterior(0.5, {}, {}, {}, {}, {}, {})


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (lambda: asking.check_key(7), "key=7 is not a JAX random key; pass jax.random.key"),
        (lambda: asking.check_key(jax.random.split(jax.random.key(0))), "is not a JAX random key"),
        (lambda: asking.check_posterior(None, "diagnose"), "diagnose got None for a posterior; pass what bayesrl.fit"),
        (lambda: asking.check_named([FIT], "compare"), "compare got a list; pass fits by name"),
        (lambda: asking.check_named({1: FIT}, "compare"), "name 1 of a fit, which is no text; use '1'"),
        (lambda: asking.check_named({"a": 3}, "compare"), "compare, under 'a', got an int for a posterior"),
        (lambda: asking.check_count("num_samples", 2.5, least=9), "num_samples=2.5; use a whole number of at least 9"),
        (lambda: asking.check_count("num_samples", float("nan")), "num_samples=nan"),
        (lambda: asking.check_bound("high"), "reward_bound='high' is no finite number"),
        (lambda: asking.check_bound(jnp.inf), "reward_bound=inf is no finite number"),
        (lambda: asking.check_arguments(jnp.zeros(2)), "held_out is an array; pass a tuple"),
    ],
)
def test_refused(asked: Callable[[], Any], words: str) -> None:
    with pytest.raises(BayesRLError) as caught:
        asked()
    assert words in str(caught.value)


def test_taken() -> None:
    asking.check_key(jax.random.key(0))
    asking.check_key(jax.random.PRNGKey(0))
    asking.check_named({"a": FIT}, "compare")
    asking.check_count("num_samples", np.int64(9), least=9)
    for bound in (None, 2, 2.5, np.float32(2), jnp.asarray(2.0)):
        asking.check_bound(bound)
    asking.check_arguments((jnp.zeros(2),))
