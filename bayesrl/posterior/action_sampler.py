"""Choose actions of one fitted policy, one after another, by a program that is prepared once."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from bayesrl.compilation.jit import ClosureJit, TracedProgram
from bayesrl.compilation.random_keys import as_hash_key
from bayesrl.core.programs import Programs
from bayesrl.core.structure import as_arrays
from bayesrl.typing import Params, PRNGKey
from bayesrl.value_checks import is_traced, is_under_jit

_MOST_KEPT = 64
"""Most prepared programs of one policy: one for each shape of the observed arrays and value of the other arguments."""


class ActionSampler:
    """The policy of one fit, fixed as it was when it first acted."""

    def __init__(self, programs: Programs, params: Params) -> None:
        self.programs, self.params = programs, params
        self._prepared: OrderedDict[Any, TracedProgram] = OrderedDict()

    def __call__(self, key: PRNGKey, *observation: Any) -> Any:
        """Choose actions; without an observation, use the arguments of the fit."""
        leaves, tree = jax.tree.flatten(observation or self.programs.args)
        if observation:
            leaves = self._numbers_as_arrays(leaves, tree)
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray))
        arrays = [leaves[i] for i in places]
        rest = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
        key = as_hash_key(key)
        if not (_all_numbers(key, *arrays) and _hashable(rest)):
            return self._choose(key, *jax.tree.unflatten(tree, leaves))
        # A weak type makes other dtypes, so it needs a program of its own.
        shapes = tuple((x.shape, x.dtype, getattr(x, "weak_type", False)) for x in arrays)
        form = (tree, rest, tuple(map(type, rest)), shapes, key.dtype)
        if form not in self._prepared:
            if is_under_jit():
                return self._choose(key, *jax.tree.unflatten(tree, leaves))  # keep no tracers

            def act(_: None, key: PRNGKey, arrays: list[Any]) -> Any:
                whole = list(rest)
                for i, array in zip(places, arrays, strict=True):
                    whole[i] = array
                return self._choose(key, *jax.tree.unflatten(tree, whole))

            self._prepared[form] = ClosureJit(act, name="act").traced(None, key, arrays)
            while len(self._prepared) > _MOST_KEPT:
                self._prepared.popitem(last=False)
        return self._prepared[form].run([key, *arrays])

    def _choose(self, key: PRNGKey, *args: Any) -> Any:
        drawn = replace(self.programs, args=as_arrays(args)).run_guide(key, None, self.params, {}, ())
        actions = {name: drawn.sites[name].value for name in self.programs.structure.actions}
        return next(iter(actions.values())) if len(actions) == 1 else actions

    def _numbers_as_arrays(self, leaves: list[Any], tree: Any) -> list[Any]:
        """Turn numbers into arrays, so that a new value needs no new trace, unless they were numbers in the fit too."""
        own, own_tree = jax.tree.flatten(self.programs.args)
        fixed = [isinstance(x, bool | int | float) for x in own] if own_tree == tree else [False] * len(leaves)
        return [
            np.asarray(x) if isinstance(x, bool | int | float | np.generic) and not stays else x
            for x, stays in zip(leaves, fixed, strict=True)
        ]


def _all_numbers(*arrays: Any) -> bool:
    """Whether arrays have known values, of dtypes that JAX can take."""
    return not any(is_traced(x) or (isinstance(x, np.ndarray) and x.dtype.kind not in "biufc") for x in arrays)


def _hashable(values: Any) -> bool:
    try:
        hash(values)
    except TypeError:
        return False
    return True
