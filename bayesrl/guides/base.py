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
    """A configuration that builds a guide for a policy: a frozen dataclass with JSON-able fields.

    A guide is a plain NumPyro program with the policy's arguments. It draws the policy's action
    sites, may replay its environment sites, and declares its trainable parameters by `numpyro.param`.

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
            policy: the program; its parameters are not frozen, so that the guide gets its own
                copy under the same names.
            structure: of the policy, from `bayesrl.core.structure.inspect`.
            args: arguments of the program.

        Returns:
            A NumPyro program that takes the same arguments.

        Raises:
            GuideError: the family cannot make a guide for a site; the message names the site and the remedy.
        """

    @abc.abstractmethod
    def overdispersed_init(self, key: PRNGKey, params: Params) -> Params:
        """Return overdispersed starting values for a restart, shaped like `params`; `key` is consumed whole."""

    @abc.abstractmethod
    def learning_rate_for(self, params: Params) -> float:
        """Suggest an Adam rate for these parameters."""


type Guide = Annotated[Program | AutoGuide, CHECKED_IN_BODY]
"""A guide of a fit: a program, or a family that builds one for the policy."""


@checked(GuideError)
class PolicyGuide:
    """A guide that is the policy's own program with other distributions at its action sites.

    As a guide it shows only its draws and the deterministic sites with a $ in their name, which pass values
    to objectives. `program` is the same program with all rewards, observed and deterministic sites: the fitted
    policy. `within_prior` declares that its actions never leave the prior's support and that it does not change nature;
    `starts_at_prior`, that it draws as the policy does until its parameters are trained.

    Example:
        >>> import numpyro, numpyro.distributions as dist, bayesrl
        >>> def tilted():
        ...     bayesrl.reward("payoff", 1.0 * numpyro.sample("arm", dist.Bernoulli(0.9)))
        >>> guide = bayesrl.guides.PolicyGuide(tilted)
        >>> list(numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace())
        ['arm']
    """

    def __init__(self, program: Program, *, within_prior: bool = False, starts_at_prior: bool = False) -> None:
        self.program, self.within_prior, self.starts_at_prior = program, within_prior, starts_at_prior
        self.__wrapped__ = program  # so that `inspect.signature` sees its arguments

    def __call__(self, *args: Any) -> Any:
        """Run as a guide."""
        with handlers.block(hide_fn=_is_scored):
            return self.program(*args)


def _is_scored(msg: dict[str, Any]) -> bool:
    """Whether a guide hides a site, because it shows only its draws."""
    if msg["type"] == "deterministic":
        return "$" not in str(msg["name"])
    return msg["type"] == "sample" and site_kind(msg) in ("reward", "observed")
