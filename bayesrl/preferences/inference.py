"""`infer`: the posterior of scores, by Laplace, NUTS, conjugate updates, SVI or quadrature."""

from dataclasses import replace
from typing import Any, Literal

import jax
import numpy as np
import optax

from bayesrl.arguments import Count, CountAboveOne, UnusedOption, checked
from bayesrl.compilation.random_keys import fold_in
from bayesrl.diagnostics.tail_behaviour import rank_rhat
from bayesrl.errors import PreferenceError
from bayesrl.preferences.engines.cone_quadrature import check_axes, integrate
from bayesrl.preferences.engines.conjugate_normal import normal_posterior
from bayesrl.preferences.engines.gaussian_guide import gaussian_guide, gaussian_of
from bayesrl.preferences.engines.gibbs_sampling import gibbs_chains
from bayesrl.preferences.engines.laplace_approximation import (
    FlatDensity,
    Gaussian,
    as_vectors,
    heavy_draws,
    laplace,
    weighted_check,
)
from bayesrl.preferences.preference_program import PreferenceModel
from bayesrl.preferences.reward_posterior import RewardPosterior
from bayesrl.preferences.score_models import ScoreModel
from bayesrl.preferences.text_scores import TrainedTextScores
from bayesrl.statistics.estimates import Estimate
from bayesrl.svi.fitting import fit
from bayesrl.typing import PRNGKey

type InferenceMethod = Literal["laplace", "nuts", "gibbs", "fit", "quadrature", "conjugate"]

_CHAINS = ("nuts", "gibbs")
_WEIGHED = 2000
_MAX_RHAT = 1.05
_OVERSAMPLED = 20
_RATE = 0.03
"""Of Adam at its first step, in units of the prior."""


@checked(
    PreferenceError,
    UnusedOption("num_warmup", lambda given: given["method"] not in _CHAINS, "only 'nuts' and 'gibbs' warm up"),
    UnusedOption("num_chains", lambda given: given["method"] not in _CHAINS, "only 'nuts' and 'gibbs' run chains"),
    UnusedOption("num_steps", lambda given: given["method"] != "fit", "only method='fit' takes steps"),
)
def infer(
    key: PRNGKey,
    model: PreferenceModel,
    *,
    method: InferenceMethod = "laplace",
    num_samples: CountAboveOne = 1000,
    num_warmup: Count = 500,
    num_chains: CountAboveOne = 4,
    num_steps: Count = 2000,
) -> RewardPosterior:
    """Infer what the scores of a preference model may be, given its data.

    Args:
        key: consumed whole.
        model: made by `bradley_terry`, `thurstone`, `plackett_luce` or `gaussian_ratings`.
        method: "laplace", N(mode, −Hessian⁻¹) by Newton's method, with its error by weighted draws; "nuts"; "gibbs", by
            conjugate updates given Pólya–Gamma variables (Bradley–Terry) or impressions (Thurstone); "fit",
            `bayesrl.fit` with a full-rank normal guide; "quadrature", exact, for at most four latent numbers; or
            "conjugate", exact, for `gaussian_ratings`. Pairs, labels and rankings have no conjugate prior.
        num_samples: draws to keep, of all chains together.
        num_warmup: steps of each chain that are thrown away.
        num_chains: chains of NUTS, or of Gibbs sampling.
        num_steps: gradient steps of the fit.

    Returns:
        `RewardPosterior`.

    Raises:
        PreferenceError: there is no mode; chains disagree; the method does not take the model.

    Example:
        >>> import jax
        >>> from bayesrl import preferences
        >>> data = preferences.PreferenceData.of_pairs([0] * 8 + [1] * 8, [1] * 8 + [2] * 8, [0] * 6 + [1] * 10)
        >>> posterior = preferences.infer(jax.random.key(0), preferences.bradley_terry(data))
        >>> int(posterior.p_best.mean.argmax())
        1

    References:
        MacKay (1992), "The evidence framework applied to classification networks"; Hoffman & Gelman (2014), "The
        No-U-Turn sampler"; Vehtari et al. (2024), "Pareto smoothed importance sampling", for k̂.
    """
    density = FlatDensity.of(model)
    if method != "fit" and isinstance(model.score_model, TrainedTextScores):
        raise PreferenceError(
            f"method={method!r} trains nothing, and the scores have train=; use method='fit', and then any method for "
            "the model of its posterior, whose last layer stands on what was trained"
        )
    rng = np.random.default_rng(np.asarray(jax.random.bits(fold_in(key, 1), (4,))).tolist())
    if method in ("nuts", "gibbs"):
        sizes = (num_chains, num_warmup, -(-num_samples // num_chains))
        chains = _nuts(key, density, *sizes) if method == "nuts" else gibbs_chains(density, rng, *sizes)
        return _of_chains(density.model, method, density, rng, chains)
    if method == "fit":
        return _by_fit(key, model, rng, num_samples, num_steps)
    if method == "conjugate":
        exactly, log_evidence = normal_posterior(density)
        draws = density.split(exactly.draw(rng, num_samples))
        return RewardPosterior(model, method, draws, exactly, _exactly(log_evidence), _exactly(0.0))
    if method == "quadrature":
        check_axes(density)
    gaussian, own_evidence = laplace(density)
    check = weighted_check(density, gaussian, rng, _WEIGHED)
    if method == "laplace":
        draws = density.split(gaussian.draw(rng, num_samples))
        told = {"laplace_log_evidence": own_evidence, "khat": check.khat}
        return RewardPosterior(model, method, draws, gaussian, check.log_evidence, check.divergence, told)
    exact = integrate(density, gaussian)
    proposed, log_q = heavy_draws(gaussian, rng, _OVERSAMPLED * num_samples)
    log_w = density.many(proposed) - log_q
    chosen = rng.choice(len(proposed), num_samples, replace=False, p=np.exp(log_w - np.logaddexp.reduce(log_w)))
    return RewardPosterior(
        model=model,
        method=method,
        draws=density.split(proposed[chosen]),
        gaussian=None,
        log_evidence=_exactly(exact.log_evidence),
        divergence=None,
        diagnostics={"laplace_log_evidence": own_evidence, "laplace_divergence": float(check.divergence.mean)},
        exact=exact,
    )


def _exactly(value: float) -> Estimate:
    return Estimate(np.asarray(value), np.zeros(()))


def _nuts(key: PRNGKey, density: FlatDensity, num_chains: int, num_warmup: int, num_samples: int) -> np.ndarray:
    from numpyro.infer import MCMC, NUTS

    sampler = MCMC(
        NUTS(density.model),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        # Parallel chains would need a device each.
        chain_method="vectorized",
        progress_bar=False,
    )
    sampler.run(key)
    return as_vectors(density, sampler.get_samples()).reshape(num_chains, num_samples, density.size)


def _of_chains(
    model: PreferenceModel, method: str, density: FlatDensity, rng: np.random.Generator, chains: np.ndarray
) -> RewardPosterior:
    """Check chains, [chain, draw, size], and weigh a normal approximation of them for the evidence."""
    rhat = max(rank_rhat(chains[..., at]) for at in range(density.size))
    if not rhat < _MAX_RHAT:
        raise PreferenceError(
            f"the chains of method={method!r} disagree (R-hat {rhat:.2f}); raise num_warmup or num_samples, or lower "
            "the prior scale"
        )
    vectors = chains.reshape(-1, density.size)
    gaussian = Gaussian(vectors.mean(0), np.cov(vectors.T).reshape(density.size, density.size))
    check = weighted_check(density, gaussian, rng, _WEIGHED)
    told = {"rhat": rhat, "khat": check.khat}
    draws = density.split(vectors)
    return RewardPosterior(model, method, draws, None, check.log_evidence, None, told, num_chains=len(chains))


def _by_fit(
    key: PRNGKey, given: PreferenceModel, rng: np.random.Generator, num_samples: int, num_steps: int
) -> RewardPosterior:
    density = FlatDensity.of(given)
    model = density.model
    optimizer = _optimizer(model.score_model, num_steps)
    fitted = fit(key, given, guide=gaussian_guide(given), num_steps=num_steps, optimizer=optimizer, progress=False)
    programs, unconstrained = fitted.unbatched()
    params = programs.constrain(unconstrained)
    gaussian = gaussian_of(model, params)
    if isinstance(model.score_model, TrainedTextScores):
        model = replace(model, score_model=model.score_model.frozen(params))
        density = FlatDensity.of(model)
    check = weighted_check(density, gaussian, rng, _WEIGHED)
    draws = density.split(gaussian.draw(rng, num_samples))
    told = {"khat": check.khat}
    return RewardPosterior(model, "fit", draws, gaussian, check.log_evidence, check.divergence, told, fit=fitted)


def _optimizer(scores: ScoreModel, num_steps: int) -> Any:
    """Return Adam with a rate in units of the prior, and another one for what is trained under the last layer."""
    rates = {"guide": optax.cosine_decay_schedule(_RATE, num_steps)}
    if not isinstance(scores, TrainedTextScores):
        return optax.adam(rates["guide"])
    trained = scores.trainable()
    rates["body"] = optax.cosine_decay_schedule(scores.learning_rate(trained), num_steps)
    return optax.multi_transform(
        {name: optax.adam(rate) for name, rate in rates.items()},
        lambda params: {name: "body" if name in trained else "guide" for name in params},
    )
