"""The definitions of J, E[R], KL and log Z for every program; every place that shows them refers to this page.

A program draws actions x, may observe nature's draws n, may condition on data y, and collects rewards that sum
to R. A fit is a policy q. All quantities are per context; contexts are averaged, never summed:

    E[R] = E_q[R]                                   reward units
    KL   = E_q[log q(x) − log π₀(x)]                nats: KL(q‖π₀) of the action sites alone
    J    = E[R] − β·KL                              reward units
    w    = R/β + log π₀(x) − log q(x)               nats, of one draw: J = β·E_q[w]
    log Z = log E_π₀[exp(R/β)]                      nats: J* = β·log Z, J* − J = β·KL(q‖p*)

**Rewards and data.** With observed sites beside rewards π₀ means p(x|y) = π₀(x)·p(y|x)/p(y): KL is KL(q‖p(x|y)), log Z
is log E_π₀[p(y|x)·exp(R/β)] − log p(y), J(π₀) is E_p(x|y)[R]; J = E[R] − β·KL and J* = β·log Z hold unchanged.
Draws determine KL and log Z only up to log p(y), so log p(y) is computed too: by enumeration if the program is finite,
else from weights of the prior's draws (and of the fit's), and its standard error becomes part of theirs. If it is
unknown (weights worth fewer than 100 draws; data beside nature or discounted actions, for which p(y) is not defined),
J and KL are nan rather than correct up to a constant; E[R] and the loss in nats, −E_q[w], are still available.

**Data alone.** Without rewards J is the ELBO, E_q[log p(y|x)] − KL(q‖π₀), nats, and log Z is log p(y).

**Nature.** Nature's draws are averaged with her own probabilities under both q and π₀, and cancel from KL and w. J* is
then the optimum of control, at most β·log Z, and there is no log Z.

**Discounts, scales, masks.** At a site under `handlers.scale` by γᵗ the log-ratio counts γᵗ times, as the reward does
if the program says so: KL = E_q Σ γᵗ·(log q − log π₀)ₜ. J is then an objective of control, and there is no log Z.

**Another regulariser.** `enumerate_posterior` and `fit` can put D_f(q‖π₀) = E_π₀[f(q/π₀)] in the place of KL. Then
J = E[R] − β·D_f, J* is its maximum, p* is where it is attained, and there is no log Z; KL is still reported as KL.

**Mini-batches.** If a run sees part of a plate of contexts, means are over that part; their expectation is the mean
over all. NumPyro scales up sums over a subsampled plate inside a context. log Z and log p(y) refer to all data.

**Mixtures of restarts.** log q is that of the whole mixture, log Σₖ αₖ·qₖ(x), so KL is that of the mixture too.

**Annealing.** `start_beta` changes the temperature of a step, and with it the loss, w and spread of the history; J in
the history is at the requested temperature.

**Draws that serve several updates.** The history of a step describes the draws of that step and the policy that made
them: E[R], KL and J of that policy, for which they are plain unbiased means. They lag behind the current policy by
the updates that a batch serves. Ratios to the current policy would be noise and, if it has moved far, nonsense.

**Enumerated sites.** If a fit takes expectations over a site exactly, means weight its values by q.

**One estimate.** `bayesrl.evidence` computes each of these once for a fit, with one error: J and J* come from the same
draws, or are exact, the gap is their difference, and tables, checks, reports and files show no others. The draws that a
fit carries, the history of a run and held-out data give estimates of their own, and are labelled as such.

Huge terms are subtracted before they become huge (see `bayesrl.core.log_ratios`); every error includes what float32
cannot resolve.
"""

from typing import Any, Literal

from bayesrl.core.draws import Totals
from bayesrl.core.structure import Structure

type RegularizerName = Literal[
    "kl", "chi_squared", "chi_squared_kl", "jensen_shannon", "jensen_shannon_sum", "forward_kl", "alpha"
]
"""Names of D_f(q‖π₀) = E_π₀[f(q/π₀)], in the place of KL(q‖π₀); see `enumerate_posterior`."""

EPS = 2.0**-23
"""One unit in the last place of single precision, in which programs compute."""


def is_conditioned(structure: Structure) -> bool:
    """Whether π₀ means p(x|y): there are observed sites beside rewards."""
    return bool(structure.names("observed") and structure.names("reward"))


def has_marginal(structure: Structure) -> bool:
    """Whether p(y) is defined beside rewards: there is no nature and there are no discounted actions."""
    odd = any(site.kind == "environment" or (site.kind == "action" and site.discounted) for site in structure.sites)
    return is_conditioned(structure) and not odd


def is_control(structure: Structure) -> bool:
    """Whether J* is an optimum of control, with no log Z and no p*: nature draws too, or sites are discounted."""
    return any(site.kind == "environment" or site.discounted for site in structure.sites)


def rounding(totals: Totals, beta: Any) -> Any:
    """Bound the error of single precision in w of each draw: a unit in the last place of each summand, nats."""
    # A ratio that was computed as one loses digits of itself alone, not of the two terms that cancel in it.
    known = abs(totals.log_prior) + abs(totals.log_q) if totals.log_ratio is None else abs(totals.log_ratio)
    size = abs(totals.reward / beta) + abs(totals.log_likelihood) + known
    return EPS * size + (0.0 if totals.doubt is None else totals.doubt)


def divergence(totals: Totals, *, conditioned: bool) -> Any:
    """Return log q − log π₀ of each draw, nats, with mean KL(q‖π₀); with data beside rewards, minus log p(y|x)."""
    return -totals.ratio - totals.log_likelihood if conditioned else -totals.ratio
