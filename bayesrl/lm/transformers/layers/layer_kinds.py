"""The two kinds of layer that a config.json may name: with a window on the text, and without one."""

from collections.abc import Mapping, Sequence
from typing import Any

from bayesrl.errors import LanguageModelError

SLIDING, FULL = "sliding_attention", "full_attention"


def windowed_layers(json: Mapping[str, Any], kinds: Any, depth: int) -> tuple[int, ...]:
    """Give the layers that have a window, of a kind for each layer."""
    if not (isinstance(kinds, list) and len(kinds) == depth and set(kinds) <= {SLIDING, FULL}):
        raise LanguageModelError(
            f"config.json of a {json.get('model_type')!r} model sets layer_types={kinds!r:.200}; name {SLIDING!r} or "
            f"{FULL!r} for each of {depth} layers"
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING)


def layer_types(windowed: Sequence[int], depth: int) -> list[str]:
    """Give a kind for each layer."""
    return [SLIDING if layer in windowed else FULL for layer in range(depth)]
