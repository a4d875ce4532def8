"""The protocol of guide families: how a guide is built for a policy."""

import abc
from typing import Annotated, Any

from numpyro import handlers

from bayesrl.argument_types import CHECKED_IN_BODY
from bayesrl.arguments import checked
from bayesrl.core.primitives import site_kind
from bayesrl.core.structure import Structure
from bayesrl.errors import GuideError
from bayesrl.typing import Params, PRNGKey, Program


class AutoGuide(abc.ABC):
    """A configuration that builds a guide for a policy; a frozen dataclass with fields that JSON can hold.

    A guide is a plain NumPyro program with the policy's arguments: it draws the policy's action
    sites, may replay its environment sites, and declares what is trained by `numpyro.param`.

    Example:
        >>> import jax, bayesrl
        >>> guide = bayesrl.guides.AutoTilt(tilt="table")
        >>> isinstance(guide, bayesrl.guides.AutoGuide), guide.learning_rate_for({"arm$table": jax.numpy.zeros(3)})
        (True, 0.1)
    """

    @abc.abstractmethod
    def build(self, key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...]) -> Program:
        """Build the guide.

        Args:
            key: consumed whole.
            policy: the program; parameters inside it are not frozen, so that the guide gets its own
                copy under the same names.
            structure: of the policy, from `bayesrl.core.structure.inspect`.
            args: arguments of the program.

        Returns:
            A NumPyro program that takes the same arguments.

        Raises:
            GuideError: the family cannot make a guide for a site; the site and the remedy are named.
        """

    @abc.abstractmethod
    def overdispersed_init(self, key: PRNGKey, params: Params) -> Params:
        """Give overdispersed starting values for a restart, of the shapes of `params`; `key` is consumed whole."""

    @abc.abstractmethod
    def learning_rate_for(self, params: Params) -> float:
        """Suggest an Adam rate for these parameters."""


type Guide = Annotated[Program | AutoGuide, CHECKED_IN_BODY]
"""What a fit adapts: a program, or a family that builds one for the policy."""


@checked(GuideError)
class PolicyGuide:
    """A guide that is the policy's own program, its action sites drawn from other distributions.

    As a guide it shows only what it draws, and the deterministic sites with a $ in their name, by which it
    speaks to objectives; `program` is the same with rewards, observed and
    deterministic sites: the fitted policy. `within_prior` says that its actions never leave the support of the prior's,
    and that it leaves nature alone.

    Example:
        >>> import numpyro, numpyro.distributions as dist, bayesrl
        >>> def tilted():
        ...     bayesrl.reward("payoff", 1.0 * numpyro.sample("arm", dist.Bernoulli(0.9)))
        >>> guide = bayesrl.guides.PolicyGuide(tilted)
        >>> list(numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace())
        ['arm']
    """

    def __init__(self, program: Program, *, within_prior: bool = False) -> None:
        self.program, self.within_prior = program, within_prior

    def __call__(self, *args: Any) -> Any:
        """Run as a guide."""
        with handlers.block(hide_fn=_is_scored):
            return self.program(*args)


def _is_scored(msg: dict[str, Any]) -> bool:
    """Whether a guide hides a site: it shows only what it draws."""
    if msg["type"] == "deterministic":
        return "$" not in str(msg["name"])
    return msg["type"] == "sample" and site_kind(msg) in ("reward", "observed")
