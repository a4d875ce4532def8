"""The names of a model's arrays in a checkpoint."""

from collections.abc import Iterator
from typing import NamedTuple


class CheckpointTensor(NamedTuple):
    """One array: its name in a checkpoint and its place in the model."""

    name: str  # as Hugging Face's transformers writes it
    path: str  # as `jax.tree_util.keystr` writes it: `.layers[0].attention.output.weight`
    transposed: bool = False  # whether the checkpoint stores [in, out] where the model has [out, in]


def affine(name: str, path: str, *, bias: bool = True, transposed: bool = False) -> Iterator[CheckpointTensor]:
    """List the weight, and the bias if there is one, of a linear map or a norm."""
    yield CheckpointTensor(f"{name}.weight", f"{path}.weight", transposed)
    if bias:
        yield CheckpointTensor(f"{name}.bias", f"{path}.bias")
