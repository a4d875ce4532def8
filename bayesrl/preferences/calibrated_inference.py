"""`score_inference`: inference of preference models as `bayesrl.calibrate` checks it, by simulated judgements."""

from typing import Any, Literal

import jax
import numpy as np

from bayesrl.arguments import Count, UnusedOption, checked
from bayesrl.diagnostics.simulation_based_calibration import (
    Drawer,
    HostDrawer,
    Inference,
    nuts_inference,
    svi_inference,
)
from bayesrl.errors import PreferenceError
from bayesrl.preferences.engines.conjugate_normal import normal_posterior
from bayesrl.preferences.engines.gaussian_guide import gaussian_guide
from bayesrl.preferences.engines.gibbs_sampling import gibbs_chains
from bayesrl.preferences.engines.laplace_approximation import FlatDensity, laplace
from bayesrl.preferences.preference_program import OUTCOME, PreferenceModel
from bayesrl.typing import PRNGKey, Program

type SimulatedMethod = Literal["laplace", "nuts", "gibbs", "fit", "conjugate"]

_THINNING = 3
_RATE = 0.05


@checked(
    PreferenceError,
    UnusedOption("num_warmup", lambda given: given["method"] not in ("nuts", "gibbs"), "only chains warm up"),
    UnusedOption("num_steps", lambda given: given["method"] != "fit", "only method='fit' takes steps"),
)
def score_inference(
    model: PreferenceModel, *, method: SimulatedMethod = "laplace", num_warmup: Count = 200, num_steps: Count = 300
) -> Inference:
    """Infer scores as `infer` does, of judgements that `bayesrl.calibrate` simulates.

    `calibrate` draws scores from the prior and judgements of the same pairs given them, infers, and ranks the scores
    that it drew among those inferred: if inference is right, the ranks are uniform. So it checks that prior, likelihood
    and method agree, before any real judgement is looked at.

    Args:
        model: made by `bradley_terry`, `thurstone`, `plackett_luce` or `gaussian_ratings`; its judgements only say
            which items are compared, and by whom.
        method: as in `infer`; of chains, every third draw counts.
        num_warmup: steps of each chain that are thrown away.
        num_steps: gradient steps of the fit.

    Returns:
        What `bayesrl.calibrate` takes as `infer=`.

    Raises:
        PreferenceError: the method does not take the model, as it turns out on use.

    Example:
        >>> import jax, bayesrl
        >>> from bayesrl import preferences
        >>> model = preferences.bradley_terry(preferences.PreferenceData.of_pairs([0, 0, 1], [1, 2, 2]))
        >>> infer = preferences.score_inference(model, method="laplace")
        >>> bayesrl.calibrate(jax.random.key(0), model, infer=infer, num_replications=40).verdict
        'pass'

    References:
        Talts, Betancourt, Simpson, Vehtari & Gelman (2018), "Validating Bayesian inference algorithms with
        simulation-based calibration".
    """
    if method == "fit":
        return svi_inference(guide=lambda _: gaussian_guide(model)(), num_steps=num_steps, learning_rate=_RATE)
    if method == "nuts":
        return nuts_inference(num_warmup=num_warmup, thinning=_THINNING)

    def prepare(key: PRNGKey, program: Program, args: tuple[Any, ...], num_samples: int) -> Drawer:
        shared = FlatDensity.of(model)

        def draw(key: PRNGKey, args: tuple[Any, ...]) -> dict[str, Any]:
            density = shared.given(args[0][OUTCOME])
            rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint32).tolist())
            if method == "gibbs":
                chain = gibbs_chains(density, rng, 1, num_warmup, _THINNING * num_samples)
                return density.split(chain[0, ::_THINNING])
            gaussian, _ = laplace(density) if method == "laplace" else normal_posterior(density)
            return density.split(gaussian.draw(rng, num_samples))

        return HostDrawer(draw)

    return prepare
