"""Turn a posterior into an ArviZ DataTree, and rebuild it from the netCDF file of a run folder."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bayesrl.errors import PolicyError
from bayesrl.posterior.posterior import Posterior
from bayesrl.value_checks import format_value

if TYPE_CHECKING:  # xarray takes as long to import as all other packages together
    import xarray as xr

PACKAGES = ("bayesrl", "numpyro", "jax", "arviz", "numpy")


def to_datatree(posterior: Any) -> "xr.DataTree":
    """Return a posterior's draws, statistics and history as an ArviZ DataTree.

    Restarts are the dimension `chain`, draws are `draw`, and an array of temperatures is `beta`. A site named
    like a dimension gets a trailing "_", and "/" becomes "."; the variable's attribute `site` has the original name.

    Args:
        posterior: fitted or loaded; or a result of `bayesrl.control.learn`, which has groups of its own.

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
    if own is None and not isinstance(posterior, Posterior):
        raise PolicyError(f"to_datatree got posterior={format_value(posterior)}; use a Posterior, {Posterior.GIVEN_BY}")
    if own is not None:
        tree: xr.DataTree = own()
        return tree
    tree = xr.DataTree.from_dict(
        {name: xr.Dataset(group.variables, coords=group.coords) for name, group in _groups(posterior).items()}
    )
    tree.attrs = _attributes(posterior)
    return tree


def as_netcdf(posterior: Posterior) -> bytes:
    """Return the DataTree of a posterior as the bytes of a netCDF file, if possible without the slow import of xarray.

    Only where xarray has its own encoding (for empty arrays, and for dtypes other than plain numbers) does xarray write
    the file. The bytes are made in memory, because on a full disk the netCDF library would end the process.
    """
    groups = _groups(posterior)
    if not all(group.is_plain for group in groups.values()):
        return bytes(to_datatree(posterior).to_netcdf(engine="h5netcdf"))
    import h5netcdf

    held = BytesIO()
    with h5netcdf.File(held, "w") as file:
        file.attrs.update(_attributes(posterior))
        for name, group in groups.items():
            made = file.create_group(name)
            made.dimensions = group.sizes
            for own, array in group.coords.items():
                made.create_variable(own, (own,), data=array)
            for own, (dims, array, told) in group.variables.items():
                fill = np.nan if array.dtype.kind == "f" else None  # the fill values that xarray writes
                made.create_variable(own, tuple(dims), data=array, fillvalue=fill).attrs.update(told)
    return held.getvalue()


class _Group(NamedTuple):
    """Arrays by name, each with the names of its dimensions and its attributes, and coordinates of dimensions."""

    variables: dict[str, tuple[list[str], np.ndarray, dict[str, str]]]
    coords: dict[str, np.ndarray]

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each dimension."""
        return {
            dim: size for dims, array, _ in self.variables.values() for dim, size in zip(dims, array.shape, strict=True)
        }

    @property
    def is_plain(self) -> bool:
        """Whether all arrays hold numbers of 4 or 8 bytes, and none is empty."""
        arrays = [*(array for _, array, _ in self.variables.values()), *self.coords.values()]
        return all(array.dtype.kind in "iuf" and array.dtype.itemsize in (4, 8) and array.size > 0 for array in arrays)


def _groups(posterior: Posterior) -> dict[str, _Group]:
    has_beta = np.ndim(posterior.beta) == 1 if posterior.beta is not None else False
    lead = ["beta", "chain"] if has_beta else ["chain"]
    coords: dict[str, Any] = {"beta": np.asarray(posterior.beta)} if has_beta else {}
    stats = _drawn(posterior.statistics, [*lead, "draw"], coords)
    name = posterior.settings.get("regularizer", "kl")
    if name != "kl" and "log_weight" in stats.variables:
        dims, array, told = stats.variables["log_weight"]
        of_kl = f"R/β + log π₀ − log q, the weight to the p* of KL; the fit has regularizer={name}, and another optimum"
        stats.variables["log_weight"] = (dims, array, told | {"description": of_kl})
    return {
        "posterior": _drawn(posterior.draws, [*lead, "draw"], coords),
        "prior": _drawn({k: np.asarray(v)[None] for k, v in posterior.prior_draws.items()}, ["chain", "draw"], {}),
        "sample_stats": stats,
        "training": _history(posterior.history, lead, coords),
    }


def _drawn(arrays: Mapping[str, Any], lead: list[str], coords: Mapping[str, Any]) -> _Group:
    """Name the dimensions of draws, [*lead, ...], and move chain, draw and β to the front."""
    order = [dim for dim in ("chain", "draw", "beta") if dim in lead]
    names = _stored(list(arrays), order)
    variables = {}
    for values, (stored, attributes) in zip(arrays.values(), names, strict=True):
        array = np.asarray(values)
        own = [f"{stored}{_AXIS}{i}" for i in range(array.ndim - len(lead))]
        axes = [lead.index(dim) for dim in order] + list(range(len(lead), array.ndim))
        variables[stored] = (order + own, array.transpose(axes), attributes)
    group = _Group(variables, {})
    counted = {dim: np.arange(size) for dim, size in group.sizes.items() if dim in ("chain", "draw")}
    return _Group(variables, {**coords, **counted} if variables else {})


_AXIS = "_dim_"


def _stored(names: Sequence[str], dims: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Return the stored name of each array, and an attribute with the original name if the two differ."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        stored = name.replace("/", ".") if name.strip("./") else "_"  # dots alone are a folder in a file
        while stored in found or stored in dims or _AXIS in stored:
            stored = stored.replace(_AXIS, "_dim.") + "_"
        found[stored] = {} if stored == name else {"site": name}
    return list(found.items())


def _history(history: Mapping[str, np.ndarray], lead: list[str], coords: Mapping[str, Any]) -> _Group:
    told = {name: np.asarray(values) for name, values in history.items() if name != "step"}
    names = _stored(list(told), ["step", *lead])
    variables = {
        stored: (["step", *lead], values, own) for values, (stored, own) in zip(told.values(), names, strict=True)
    }
    return _Group(variables, {"step": np.asarray(history["step"]), **coords} if variables else {})


def _attributes(posterior: Posterior) -> dict[str, Any]:
    attrs: dict[str, Any] = {f"{name}_version": version(name) for name in PACKAGES}
    attrs["inference_library"] = "bayesrl"
    if posterior.beta is not None and np.ndim(posterior.beta) == 0:
        attrs["beta"] = float(posterior.beta)
    elif posterior.beta is not None:
        attrs["beta"] = np.asarray(posterior.beta)
    # netCDF attributes cannot be booleans.
    attrs["interrupted"] = int(posterior.interrupted)
    attrs |= {name: value for name, value in posterior.settings.items() if isinstance(value, str | int | float)}
    return attrs


def from_datatree(tree: "xr.DataTree", params: Mapping[str, Any], settings: Mapping[str, Any]) -> Posterior:
    """Rebuild a posterior, without its programs, from a DataTree made by `to_datatree`."""
    beta = tree.attrs.get("beta")
    # A netCDF attribute that is an array of one element reads back as a number.
    has_beta = np.ndim(np.asarray(beta)) == 1 or any("beta" in tree[name].dims for name in ("posterior", "training"))
    lead = ["beta", "chain"] if has_beta else ["chain"]

    def arrays(group: str, dims: list[str]) -> dict[str, Any]:
        dataset = tree[group].to_dataset()
        return {
            str(variable.attrs.get("site", name)): np.asarray(variable.transpose(*dims, ...).values)
            for name, variable in dataset.data_vars.items()
        }

    training = tree["training"].to_dataset()
    history = {
        str(variable.attrs.get("site", name)): np.asarray(variable.transpose("step", *lead).values)
        for name, variable in training.data_vars.items()
    }
    if history:
        history["step"] = np.asarray(training["step"].values)
    prior = {name: values[0] for name, values in arrays("prior", ["chain", "draw"]).items()}
    return Posterior(
        beta=None if beta is None else (np.atleast_1d(beta) if has_beta else float(beta)),
        params=dict(params),
        history=history,
        draws=arrays("posterior", [*lead, "draw"]),
        statistics=arrays("sample_stats", [*lead, "draw"]),
        prior_draws=prior,
        settings=dict(settings),
        interrupted=bool(tree.attrs.get("interrupted", 0)),
    )
