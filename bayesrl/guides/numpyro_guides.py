"""Use NumPyro's automatic guides in a fit."""

from typing import Any

from numpyro import handlers

from bayesrl.core.structure import Structure
from bayesrl.errors import GuideError
from bayesrl.typing import PRNGKey


def set_up_autoguide(key: PRNGKey, guide: Any, structure: Structure, args: tuple[Any, ...]) -> None:
    """Call a guide of `numpyro.infer.autoguide` once, so that it sets itself up from its model.

    The first call stores values in the guide, so it must come before any tracing, or they would be tracers. This
    leaves other guides alone. `key` is consumed whole: the guide draws its starting values from it.

    Raises:
        GuideError: the guide has no density over the policy's actions, or does not suit them.
    """
    from numpyro.infer import autoguide

    if not isinstance(guide, autoguide.AutoGuide):
        return
    name = type(guide).__name__
    by_hand = "numpyro.infer.SVI(bayesrl.tilt(policy, beta), guide, optimizer, numpyro.infer.Trace_ELBO()) takes it"
    if isinstance(guide, autoguide.AutoDelta):
        raise GuideError(
            f"{name} puts all probability on one point, from which KL(q‖π₀) is infinite and J is not; "
            f"use guide=None, or AutoNormal(policy) of NumPyro; for the most probable point, {by_hand}"
        )
    if isinstance(guide, autoguide.AutoContinuous | autoguide.AutoSemiDAIS):
        raise GuideError(
            f"{name} draws one auxiliary vector for all sites, so that no site has a density of its own; "
            f"use guide=None, which lets each site read the ones before, or AutoNormal(policy) of NumPyro; {by_hand}"
        )
    discrete = [site.name for site in structure.sites if site.kind == "action" and site.discrete]
    if discrete:
        raise GuideError(
            f"{name} has no distribution for the discrete site {discrete[0]!r}; "
            "use guide=None, or write a guide by hand: def guide(*args): numpyro.sample(...)"
        )
    nature = structure.names("environment")
    if nature:
        raise GuideError(
            f"{name} would choose environment site {nature[0]!r}, which is nature's to draw; "
            "use guide=None, which replays nature"
        )
    timed = [site.name for site in structure.sites if site.kind == "action" and site.scan is not None]
    if timed:
        raise GuideError(
            f"{name} draws all steps of site {timed[0]!r} at once, outside of its scan; "
            "use guide=None, or write the scan into a guide by hand"
        )
    with handlers.block(), handlers.seed(rng_seed=key):
        guide(*args)
