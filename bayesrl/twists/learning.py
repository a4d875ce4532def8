"""`fit_twist`: learn a value of what is still to come, and with it a proposal."""

from collections.abc import Callable
from typing import Annotated, Any

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Count, Positive, checked
from bayesrl.compilation.random_keys import fold_in
from bayesrl.core.structure import Structure, as_arrays, inspect
from bayesrl.errors import EngineError, PolicyError
from bayesrl.guides import AutoGuide
from bayesrl.objectives.twist_learning import ContrastiveTwist, TwistObjective
from bayesrl.posterior.posterior import Posterior
from bayesrl.svi.fitting import fit
from bayesrl.svi.optimizers import Optimizer
from bayesrl.twists.carry_guide import CarryTwist
from bayesrl.typing import PRNGKey, Program
from bayesrl.value_checks import LEAST, format_value, is_real

type MakeFamily = Callable[[AutoGuide | None], AutoGuide]

_FAMILIES: dict[type, MakeFamily] = {}


def register_twists(kind: type, make: MakeFamily) -> None:
    """Let programs of one class have twists of their own: `make` gets the guide that trains below them, or None."""
    _FAMILIES[kind] = make


type OneBeta = Annotated[
    float | None,
    Requirement(
        "one temperature in reward units per nat, above 0",
        lambda value: value is None or (is_real(value) and value >= LEAST),
        any_type=True,
        error=PolicyError,
    ),
]
"""A temperature; a twist belongs to one."""

type TwistLearner = Annotated[
    Any,
    Requirement(
        "bayesrl.objectives.ContrastiveTwist() or SoftValueRegression(), or None",
        lambda value: value is None or isinstance(value, TwistObjective),
        any_type=True,
    ),
]


@checked(EngineError)
def fit_twist(
    key: PRNGKey,
    policy: Program,
    *args: Any,
    beta: OneBeta = None,
    objective: TwistLearner = None,
    guide: AutoGuide | None = None,
    optimizer: Optimizer | None = None,
    learning_rate: Positive | None = None,
    num_steps: Count = 1000,
    progress: bool = True,
) -> Posterior:
    """Learn a twist, a value of what is still to come, together with the proposal that it induces.

        ψ_t ≈ log E_π₀[exp(what is to come after step t / β)],    q(x_t | x_{<t}) ∝ π₀(x_t | x_{<t})·exp(r_t/β + ψ_t).

    With the exact ψ, q is p*. The result is a fit of q like any other, for `sample`, `estimate`, `log_prob` and
    `evidence`, and it is a twist: `smc(key, policy, beta=beta, twist=result)` and
    `evidence(key, posterior, method="smc", twist=result)` weigh and resample its particles by ψ, in reward units.

    Of a program with one `scan`, ψ is a function of step and carry: a table where the carry takes few values, else a
    small network. If the draws of a step can be listed, q tries them all; else q is the prior, and ψ only weighs. Of a
    language model, ψ has a value for every next token, from a head on the model: the head alone, or with low-rank
    paths or all parameters of a copy of the model trained below it.

    Args:
        key: for all random choices of the fit.
        policy: a program with one `scan`, or a policy of `bayesrl.lm`; without environment sites.
        *args: its arguments.
        beta: temperature, reward units per nat: one number; required with rewards.
        objective: `ContrastiveTwist()` by default, or `SoftValueRegression()`, from `bayesrl.objectives`.
        guide: of language models: `lm.LoRA(...)` or `lm.FullParameters()` to train below the head; None for the head
            alone.
        optimizer: as in `fit`.
        learning_rate: as in `fit`.
        num_steps: gradient steps.
        progress: whether to show a progress line.

    Returns:
        `Posterior` of q.

    Raises:
        EngineError: environment sites, hidden ones by name; a program without a scan; contexts that cannot be told
            apart in the carry.
        ObjectiveError: the objective does not suit the program.
        PolicyError: beta does not fit the program.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from numpyro.contrib.control_flow import scan
        >>> def walk():
        ...     def step(x, _):
        ...         x = x + numpyro.sample("step", dist.Bernoulli(0.5))
        ...         return x, None
        ...     x, _ = scan(step, 0, None, length=6)
        ...     bayesrl.reward("far", 5.0 * (x == 6))
        >>> twist = bayesrl.fit_twist(jax.random.key(0), walk, beta=1.0, num_steps=200, progress=False)
        >>> found = bayesrl.smc(jax.random.key(1), walk, beta=1.0, twist=twist, num_particles=64)
        >>> exact = bayesrl.enumerate_posterior(walk, beta=1.0)
        >>> bool(abs(found.log_evidence.mean - exact.log_evidence.mean) < 5 * found.log_evidence.se + 1e-3)
        True

    References:
        Zhao, Brekelmans, Makhzani & Grosse (2024), "Probabilistic inference in language models via twisted sequential
        Monte Carlo"; Guarniero, Johansen & Lee (2017), "The iterated auxiliary particle filter".
    """
    make = next((make for kind, make in _FAMILIES.items() if isinstance(policy, kind)), None)
    if make is None:
        if guide is not None:
            raise EngineError(
                f"guide={format_value(guide)} trains below the head of a language model, and the policy is none; leave "
                "guide= out"
            )
        family: AutoGuide = CarryTwist(beta=1.0 if beta is None else float(beta))
        _refuse_nature(inspect(fold_in(key, 0), policy, *as_arrays(args)))
    else:
        family = make(guide)
    return fit(
        key,
        policy,
        *args,
        beta=beta,
        guide=family,
        objective=ContrastiveTwist() if objective is None else objective,
        optimizer=optimizer,
        learning_rate=learning_rate,
        num_steps=num_steps,
        progress=progress,
    )


def _refuse_nature(structure: Structure) -> None:
    """Refuse environment sites, and say so if a twist would see what the agent does not.

    Raises:
        EngineError: naming the site.
    """
    hidden = [site.name for site in structure.sites if site.hidden]
    if hidden:
        raise EngineError(
            f"the agent does not see environment site {hidden[0]!r} (observable=False), and a twist of the carry "
            "would; use bayesrl.fit(...), whose tilts read what the agent sees"
        )
    if nature := structure.names("environment"):
        raise EngineError(
            f"a twist would tilt environment site {nature[0]!r}, which is nature's; use bayesrl.fit(...) for the "
            "optimum of control"
        )
