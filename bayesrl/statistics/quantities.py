"""What J, E[R], KL and log Z are, for every program: the one page to which every place that shows them refers.

A program draws actions x, perhaps hears nature's draws n, perhaps conditions on data y, and collects rewards that add
up to R. A fit is a policy q. Per context, contexts being averaged and never summed:

    E[R] = E_q[R]                                   reward units
    KL   = E_q[log q(x) − log π₀(x)]                nats: KL(q‖π₀) of the action sites alone
    J    = E[R] − β·KL                              reward units
    w    = R/β + log π₀(x) − log q(x)               nats, of one draw: J = β·E_q[w]
    log Z = log E_π₀[exp(R/β)]                      nats: J* = β·log Z, J* − J = β·KL(q‖p*)

**Rewards and data.** With observed sites beside rewards π₀ means p(x|y) = π₀(x)·p(y|x)/p(y): KL is KL(q‖p(x|y)), log Z
is log E_π₀[p(y|x)·exp(R/β)] − log p(y), J(π₀) is E_p(x|y)[R], and J = E[R] − β·KL and J* = β·log Z stand as they are.
What a draw gives is KL and log Z up to log p(y), so log p(y) is found too: by enumeration where the program is finite,
else by weights of the prior's draws (and of the fit's), with its standard error as a part of theirs. Where it is not
known (weights worth fewer than 100 draws; data beside nature or discounted actions, of which no p(y) is defined) J and
KL are nan and never given up to a constant; E[R] and the loss in nats, −E_q[w], are given all the same.

**Data alone.** Without rewards J is the ELBO, E_q[log p(y|x)] − KL(q‖π₀), nats, and log Z is log p(y).

**Nature.** Her draws are averaged with her own probabilities under q and π₀ alike and cancel from KL and w. J* is then
the optimum of control, at most β·log Z, and no log Z is given.

**Discounts, scales, masks.** At a site under `handlers.scale` by γᵗ the log-ratio counts γᵗ times, as the reward does
where the program says so: KL = E_q Σ γᵗ·(log q − log π₀)ₜ. J is an objective of control then, and no log Z is given.

**Mini-batches.** A plate of contexts of which a run sees a part gives means over that part; the expectation is that
over all. Sums over a subsampled plate inside of a context are scaled up by NumPyro. log Z and log p(y) are of all data.

**Mixtures of restarts.** log q is that of the whole mixture, log Σₖ αₖ·qₖ(x), so KL is that of the mixture too.

**Annealing.** `start_beta` changes the temperature of a step, and with it the loss, w and spread of the history; J in
the history is at the requested temperature.

**Draws that serve several updates.** What the history records of a step is of the draws of that step and of the policy
that drew them: E[R], KL and J of that policy, of which they are plain unbiased means. They lag behind the policy that
is learned by the updates that a batch serves; ratios to it would be noise and, where it has moved far, nonsense.

**Enumerated sites.** Where a fit takes expectations over a site exactly, means weight its values by q.

**One estimate.** `bayesrl.evidence` finds each of these once for a fit, with one error: J and J* are of the same
draws, or exact, the gap is their difference, and tables, checks, reports and files show no others. Draws that a fit
carries, the history of a run and data that were held out give estimates of their own, named so where they stand.

Differences of huge terms are taken before they are huge (see `bayesrl.core.log_ratios`); what float32 cannot resolve
is a part of every error that is given.
"""

from typing import Any

from bayesrl.core.draws import Totals
from bayesrl.core.structure import Structure

EPS = 2.0**-23
"""A unit in the last place of single precision, in which programs compute."""


def is_conditioned(structure: Structure) -> bool:
    """Whether π₀ means p(x|y): there are observed sites beside rewards."""
    return bool(structure.names("observed") and structure.names("reward"))


def has_marginal(structure: Structure) -> bool:
    """Whether p(y) is defined beside rewards: no nature, no discounted actions."""
    odd = any(site.kind == "environment" or (site.kind == "action" and site.discounted) for site in structure.sites)
    return is_conditioned(structure) and not odd


def rounding(totals: Totals, beta: Any) -> Any:
    """Give what single precision may be off by in w of each draw: a unit in the last place of each summand, nats.

    Args:
        totals: in double precision, or any other.
        beta: reward units per nat.
    """
    known = abs(totals.log_prior) + abs(totals.log_q) if totals.log_ratio is None else abs(totals.log_ratio)
    size = abs(totals.reward / beta) + abs(totals.log_likelihood) + known
    return EPS * size + (0.0 if totals.doubt is None else totals.doubt)


def divergence(totals: Totals, *, conditioned: bool) -> Any:
    """Give log q − log π₀ of each draw, whose mean is KL(q‖π₀); with data beside rewards, less log p(y), nats."""
    return -totals.ratio - totals.log_likelihood if conditioned else -totals.ratio
