"""A posterior as an ArviZ DataTree, and back from the netCDF file of a run folder."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from bayesrl.posterior import Posterior

if TYPE_CHECKING:  # xarray takes as long to import as everything else together
    import xarray as xr

PACKAGES = ("bayesrl", "numpyro", "jax", "arviz", "numpy")


def to_datatree(posterior: Any) -> "xr.DataTree":
    """Give a posterior's draws, statistics and history as an ArviZ DataTree.

    Restarts are `chain`, draws are `draw`, and an array of temperatures is a dimension `beta`.

    Args:
        posterior: fitted or loaded; or what `bayesrl.control.learn` gave, which tells its own groups.

    Returns:
        Groups `posterior`, `prior`, `sample_stats` (log_prior, log_q, log_weight in nats,
        total_reward in reward units) and `training` (the history, by `step`); attributes `beta`,
        the seed, the versions and how the fit was made.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Bernoulli(0.5))
        ...     bayesrl.reward("payoff", 1.0 * arm)
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=10, progress=False)
        >>> sorted(bayesrl.to_datatree(posterior).children)
        ['posterior', 'prior', 'sample_stats', 'training']
    """
    import xarray as xr

    own = getattr(posterior, "to_datatree", None)
    if own is not None:
        tree: xr.DataTree = own()
        return tree
    has_beta = np.ndim(posterior.beta) == 1 if posterior.beta is not None else False
    lead = ["beta", "chain"] if has_beta else ["chain"]
    coords: dict[str, Any] = {"beta": np.asarray(posterior.beta)} if has_beta else {}
    groups = {
        "posterior": _dataset(posterior.draws, [*lead, "draw"], coords),
        "prior": _dataset({k: jnp.asarray(v)[None] for k, v in posterior.prior_draws.items()}, ["chain", "draw"], {}),
        "sample_stats": _dataset(posterior.statistics, [*lead, "draw"], coords),
        "training": _history(posterior.history, lead, coords),
    }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = _attributes(posterior)
    return tree


def _dataset(arrays: Mapping[str, Any], lead: list[str], coords: Mapping[str, Any]) -> "xr.Dataset":
    import xarray as xr

    variables = {}
    for name, values in arrays.items():
        array = np.asarray(values)
        own = [f"{name}_dim_{i}" for i in range(array.ndim - len(lead))]
        variables[name] = (lead + own, array)
    dataset = xr.Dataset(variables, coords=dict(coords) if variables else {})
    sizes = {dim: np.arange(size) for dim, size in dataset.sizes.items() if dim in ("chain", "draw")}
    order = [dim for dim in ("chain", "draw", "beta") if dim in dataset.dims]
    return dataset.assign_coords(sizes).transpose(*order, ...)


def _history(history: Mapping[str, np.ndarray], lead: list[str], coords: Mapping[str, Any]) -> "xr.Dataset":
    import xarray as xr

    variables = {
        name.replace("/", "."): (["step", *lead], np.asarray(v)) for name, v in history.items() if name != "step"
    }
    if not variables:
        return xr.Dataset()
    return xr.Dataset(variables, coords={"step": np.asarray(history["step"]), **coords})


def _attributes(posterior: Posterior) -> dict[str, Any]:
    attrs: dict[str, Any] = {f"{name}_version": version(name) for name in PACKAGES}
    attrs["inference_library"] = "bayesrl"
    if posterior.beta is not None and np.ndim(posterior.beta) == 0:
        attrs["beta"] = float(posterior.beta)
    elif posterior.beta is not None:
        attrs["beta"] = np.asarray(posterior.beta)
    attrs["interrupted"] = int(posterior.interrupted)
    attrs |= {name: value for name, value in posterior.settings.items() if isinstance(value, str | int | float)}
    return attrs


def from_datatree(tree: "xr.DataTree", params: Mapping[str, Any], settings: Mapping[str, Any]) -> Posterior:
    """Rebuild a posterior, without its programs, from a DataTree made by `to_datatree`."""
    beta = tree.attrs.get("beta")
    has_beta = beta is not None and np.ndim(beta) == 1
    lead = ["beta", "chain"] if has_beta else ["chain"]

    def arrays(group: str, dims: list[str]) -> dict[str, Any]:
        dataset = tree[group].to_dataset()
        return {
            str(name): np.asarray(variable.transpose(*dims, ...).values) for name, variable in dataset.data_vars.items()
        }

    training = tree["training"].to_dataset()
    history = {
        str(name).replace("metrics.", "metrics/"): np.asarray(variable.transpose("step", *lead).values)
        for name, variable in training.data_vars.items()
    }
    if history:
        history["step"] = np.asarray(training["step"].values)
    prior = {name: values[0] for name, values in arrays("prior", ["chain", "draw"]).items()}
    return Posterior(
        beta=None if beta is None else (np.asarray(beta) if has_beta else float(beta)),
        params=dict(params),
        history=history,
        draws=arrays("posterior", [*lead, "draw"]),
        statistics=arrays("sample_stats", [*lead, "draw"]),
        prior_draws=prior,
        settings=dict(settings),
        interrupted=bool(tree.attrs.get("interrupted", 0)),
    )
