"""NumPyro's own ELBOs as objectives of a fit."""

from dataclasses import dataclass
from typing import Any, Never

import jax.numpy as jnp
from jax import Array
from numpyro.infer import elbo as numpyro_elbo

from bayesrl.arguments import Count, checked
from bayesrl.core.draws import Draws
from bayesrl.core.handlers import stop_gradient, tilt
from bayesrl.core.programs import Programs
from bayesrl.errors import ObjectiveError
from bayesrl.objectives.base import Info, Objective, info_from_draws
from bayesrl.objectives.gradient_plan import discontinuous_sites, refuse_jumps
from bayesrl.typing import Params, PRNGKey
from bayesrl.value_checks import format_value


@checked(ObjectiveError)
@dataclass(frozen=True)
class NumPyroELBO(Objective):
    """A NumPyro ELBO as an objective; `fit(objective=Trace_ELBO())` wraps the ELBO for you.

    Args:
        elbo: an instance of `numpyro.infer.elbo.ELBO`.
        num_particles: extra draws for the history.

    Raises:
        ObjectiveError: on use, if the ELBO's gradient would be biased for the guide's sites.

    Example:
        >>> import bayesrl
        >>> from numpyro.infer import Trace_ELBO
        >>> bayesrl.objectives.NumPyroELBO(Trace_ELBO(), num_particles=8).num_particles
        8
    """

    elbo: numpyro_elbo.ELBO
    num_particles: Count = 16

    def for_source(self, source: Any) -> Never:
        """Refuse draws of a source; see `Objective.for_source`."""
        raise self._cannot_score()

    def prepare(self, key: PRNGKey, programs: Programs, params: Params) -> "NumPyroELBO":
        """Refuse sites whose gradient the ELBO would get wrong; see `Objective.prepare`."""
        name = type(self.elbo).__name__
        if isinstance(self.elbo, numpyro_elbo.TraceEnum_ELBO):
            raise ObjectiveError(
                f"{name} gives wrong gradients where a factor is summed over a plate that it stands outside of; "
                "use ReverseKL(enumerated=...)"
            )
        guide = programs.trace_guide(params).sites
        # Nature must cancel from the ELBO, and must not block the gradient of earlier actions.
        for site in programs.structure.names("environment"):
            if site not in guide:
                raise ObjectiveError(
                    f"{name} counts the density of environment site {site!r}, which the guide does not replay, "
                    "and would tilt nature; copy the policy's environment(...) line into the guide, or use ReverseKL()"
                )
            if not (
                guide[site].fn.has_rsample
                or self.elbo.can_infer_discrete
                or site in programs.structure.drawn_before_action
            ):
                raise ObjectiveError(
                    f"{name} has no gradient through environment site {site!r}, which may answer an action; "
                    "use ReverseKL() or TraceGraph_ELBO()"
                )
        able = []
        for site in programs.structure.actions:
            if guide[site].fn.has_rsample:
                able.append(site)
            elif not self.elbo.can_infer_discrete:
                raise ObjectiveError(
                    f"{name} has no gradient for site {site!r} ({type(guide[site].fn).__name__} is not "
                    "reparameterised) and would be biased; use ReverseKL() or TraceGraph_ELBO()"
                )
        refuse_jumps(discontinuous_sites(key, programs, guide, able) if able else set(), name, "ReverseKL()")
        return self

    def draw(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw for the history; the ELBO makes its own draws."""
        return programs.draw(key, stop_gradient(params), self.num_particles)

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Refuse: a stock ELBO cannot score draws that it did not make."""
        raise self._cannot_score()

    def _cannot_score(self) -> ObjectiveError:
        return ObjectiveError(
            f"{type(self.elbo).__name__} makes its own draws and cannot score those of a source; leave source= out, or "
            "use ReverseKL()"
        )

    def evaluate(self, key: PRNGKey, params: Params, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Return the ELBO's own loss, in nats per context."""
        if programs.guide is None:
            raise ObjectiveError("a NumPyro ELBO needs a guide; pass guide=...")
        model = tilt(programs.policy, beta) if programs.structure.names("reward") else programs.policy
        # NumPyro's ELBOs take constrained parameters.
        loss = self.elbo.loss(key, programs.constrain(params), model, programs.guide, *programs.args)
        draws = self.draw(key, params, programs)
        shape = (self.num_particles, *programs.structure.context_shape)
        return jnp.asarray(loss) / programs.structure.num_contexts, info_from_draws(draws, programs, beta, shape)


def as_objective(objective: Objective | numpyro_elbo.ELBO) -> Objective:
    """Return an objective as it is, and wrap a NumPyro ELBO."""
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, numpyro_elbo.ELBO):
        return NumPyroELBO(objective)
    raise ObjectiveError(
        f"objective={format_value(objective)} is neither an objective of bayesrl.objectives nor a NumPyro ELBO; "
        "pass an instance such as ReverseKL()"
    )
