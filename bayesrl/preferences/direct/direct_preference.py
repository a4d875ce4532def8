"""`DirectPreference`: fit a policy to judgements, with β·log q/π₀ in the place of a reward."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Never

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from bayesrl.arguments import Count, Positive, UnusedOption, checked, real_range
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.errors import ObjectiveError, PreferenceError
from bayesrl.lm.prompted_policy import PromptedPolicy
from bayesrl.objectives.base import OWN, Info, Objective, draws_of_its_own, guide_params, info_from_draws
from bayesrl.preferences.direct.accepted_judgements import fingerprint_of, model_of_judgements
from bayesrl.preferences.direct.judgement_losses import (
    DirectLoss,
    implicit_reward,
    ipo_losses,
    kto_losses,
    likelihood_losses,
)
from bayesrl.preferences.direct.minibatch_rows import choose_rows
from bayesrl.preferences.direct.scored_items import ActionItems, ItemLogRatios, ScoredItems
from bayesrl.preferences.direct.scored_texts import TextItems
from bayesrl.preferences.preference_program import PreferenceModel
from bayesrl.preferences.records.preference_data import PreferenceData
from bayesrl.preferences.score_models import ScoreModel, as_whole
from bayesrl.statistics.definitions import RegularizerName
from bayesrl.typing import Params, PRNGKey

_ROWS = "judgements$"
"""The plate that holds the numbers of a step's rows."""


@dataclass(frozen=True, eq=False)
class ImplicitScores(ScoreModel):
    """Scores that a policy implies: β·f′(q/π₀) of items, as `scores` is given it for a body."""

    site = "implicit_reward"
    scale = 1.0

    @property
    def size(self) -> int:
        """It has no latent site of its own."""
        return 0

    def scores(self, latent: Array, items: Any, body: Any = None) -> Array:
        """Ask the policy."""
        result: Array = body(items)
        return result

    def for_items(self, items: Any) -> Never:
        """Refuse other items: they are prepared with the data."""
        raise PreferenceError("implicit rewards are of the items of the data; make a DirectPreference of other data")


@checked(
    PreferenceError,
    UnusedOption("alpha", lambda given: given["regularizer"] != "alpha", "only regularizer='alpha' has an order"),
    UnusedOption(
        "label_smoothing", lambda given: given["loss"] in ("ipo", "kto"), "only likelihoods have labels to smooth"
    ),
    UnusedOption("per_token", lambda given: given["loss"] != "ipo", "only loss='ipo' divides by lengths"),
    UnusedOption("desirable_weight", lambda given: given["loss"] != "kto", "only loss='kto' weighs labels"),
    UnusedOption("undesirable_weight", lambda given: given["loss"] != "kto", "only loss='kto' weighs labels"),
)
@dataclass(frozen=True)
class DirectPreference(Objective):
    """Fit a policy to judgements without a model of the reward: maximum likelihood with the reward β·log q/π₀.

    A policy q that maximises E[R] − β·KL(q‖π₀) tells its reward: R = β·log q/π₀ up to a constant, which no comparison
    sees. So the likelihood of a model of preferences is one of q. The loss is the mean over rows of

        likelihood  −log P(outcome | R) under the model: with Bradley–Terry this is DPO, with `ties=` DPO with ties,
                    with `plackett_luce` DPO of rankings; other effects of the model (ties, position, length,
                    annotators, threshold) are fitted beside the policy, with their priors. `label_smoothing=ε` gives
                    the opposite outcome the weight ε (conservative DPO);
        robust      the same without bias if each outcome was flipped with probability ε (robust DPO);
        ipo         (h − ½/β)², where h is the difference of log q/π₀ of winner and loser;
        kto         λ·σ(∓(R − z₀)) of good and bad items, z₀ = β·KL(q‖π₀).

    With enough judgements of Bradley–Terry's model of R, the likelihood leads to p* of R at the β of the fit.

    The rewards that the policy collects are not read: they are what the fit is judged by. `evidence`, `diagnose` and
    the report tell how far it ended from p* of that reward: give the policy the posterior mean of what `infer` found.

    Items of a finite policy are named by number: `PreferenceData.of_pairs`, or records whose completions are numbers of
    values, and whose prompts are numbers of contexts. Items of a policy made by `lm.policy` are texts, conversations or
    token ids; none is cut. log π₀ of all items is computed once.

    Args:
        judgements: a model made by `bradley_terry` and its like without `features=`; or data, which stand for
            `bradley_terry(data)`, for rankings `plackett_luce(data)`, and for ratings `gaussian_ratings(data)`.
        loss: as above.
        label_smoothing: ε, at least 0 and below ½; of pairs and labels.
        regularizer: f of D_f in the place of KL, as in `bayesrl.enumerate_posterior`; then R = β·f′(q/π₀), and J,
            evidence and verdict are those with D_f. "chi_squared_kl" gives χPO.
        alpha: order of regularizer="alpha".
        clip: greatest difference of the rewards of a pair that counts, reward units; for χPO, twice the reward's range.
        batch_size: rows of a step; by default all.
        per_token: whether IPO divides the reward of a text by the number of its tokens, as TRL does.
        desirable_weight: λ of good items, for KTO.
        undesirable_weight: λ of bad items, for KTO.

    Raises:
        PreferenceError: data that the loss does not take; options that do not fit. On use: items that name no action,
            texts that are longer than the policy writes, token ids of another tokenizer.
        ObjectiveError: on use: a policy with environment or observed sites, or without a list of values.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl import preferences
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(2)))
        ...     bayesrl.reward("log_strength", jnp.log(jnp.array([1.0, 3.0]))[arm])
        >>> data = preferences.PreferenceData.of_pairs([1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0])
        >>> direct = preferences.DirectPreference(data)
        >>> options = {"beta": 1.0, "objective": direct, "num_steps": 500, "progress": False}
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, **options)
        >>> probs = jnp.exp(posterior.log_prob({"arm": jnp.arange(2)})[0])
        >>> [round(float(p), 3) for p in probs]  # arm 1 won 3 of 4: odds 3 at β = 1
        [0.25, 0.75]

    References:
        Rafailov et al. (2023), "Direct preference optimization", equation 7; Azar et al. (2024), "A general theoretical
        paradigm to understand learning from human preferences", equation 17; Chowdhury, Kini & Natarajan (2024),
        "Provably robust DPO", equation 12; Ethayarajh et al. (2024), "KTO", equation 8; Wang et al. (2024), "Beyond
        reverse KL"; Huang et al. (2025), "Correcting the mythos of KL-regularization", algorithm 1 (χPO).
    """

    judgements: PreferenceModel | PreferenceData = field(compare=False)
    loss: DirectLoss = "likelihood"
    label_smoothing: Annotated[float, real_range(0, below=0.5)] = 0.0
    regularizer: RegularizerName = "kl"
    alpha: float | None = None
    clip: Positive | None = None
    batch_size: Count | None = None
    per_token: bool = False
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0
    model: PreferenceModel = field(init=False, repr=False, compare=False)
    digest: str = field(init=False, repr=False)
    items: ScoredItems | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        model = model_of_judgements(self.judgements, self.loss)
        _check_loss(self, model)
        object.__setattr__(self, "model", replace(model, score_model=ImplicitScores(), batch_size=None))
        object.__setattr__(self, "digest", fingerprint_of(model))

    @property
    def told(self) -> dict[str, Any]:
        """Settings of a fit that say what it learns from."""
        learns = f"{len(self.model.data)} {self.model.data.kind}"
        told: dict[str, Any] = {"direct": f"{learns}, loss {self._named_loss}"}
        if self.regularizer != "kl":
            told |= {"regularizer": self.regularizer} | ({} if self.alpha is None else {"alpha": self.alpha})
        return told

    @property
    def _named_loss(self) -> str:
        return self.model.name if self.loss == "likelihood" else self.loss

    @property
    def refuses_impossible(self) -> str:
        """Nothing: the rewards of the policy are not learnt from."""
        return ""

    def for_source(self, source: Any) -> Never:
        """Refuse draws of a source; see `Objective.for_source`."""
        raise draws_of_its_own("DirectPreference", "learns from judgements and draws nothing")

    def init_params(self, key: PRNGKey, programs: Programs) -> Params:
        """Return the other effects of the model, which are fitted beside the policy; see `Objective.init_params`."""
        return {f"{OWN}{name}": jnp.zeros(shape) for name, (_, shape) in self._effects.items()}

    @property
    def _effects(self) -> dict[str, tuple[float, tuple[int, ...]]]:
        """Prior standard deviation and shape of each latent site of the model but the scores."""
        if self.loss in ("ipo", "kto"):
            return {}
        return {name: prior for name, prior in self.model.priors.items() if name != ImplicitScores.site}

    def prepare(self, key: PRNGKey, programs: Programs, params: Params) -> "DirectPreference":
        """Find the items of the judgements in the policy; see `Objective.prepare`."""
        kind: Any = TextItems if isinstance(programs.policy, PromptedPolicy) else ActionItems
        return replace(self, items=kind.of(self.model.data, programs))

    def draw(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Choose the rows of a step; see `Objective.draw`."""
        count = len(self.model.data)
        size = count if self.batch_size is None else min(self.batch_size, count)
        rows = jnp.arange(size, dtype=jnp.int32)
        return Draws.from_sites({})._replace(plates={_ROWS: rows if size == count else choose_rows(key, count, size)})

    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Return the mean loss of the rows, nats for likelihoods; see `Objective.surrogate`."""
        if self.items is None:
            raise ObjectiveError(
                "DirectPreference was used before prepare(key, programs, params); call it and use what it returns"
            )
        index = draws.plates[_ROWS]
        policy = self.items.under(guide_params(params), programs)
        effects = {name: params[f"{OWN}{name}"] for name in self._effects}
        members = as_whole(self.model.data.members)[index]
        ratios = policy.log_ratios(members)
        implied = implicit_reward(ratios, self.regularizer, self.alpha)
        if self.per_token:
            implied = implied / jnp.asarray(self.items.lengths, implied.dtype)[members]
        implied = self._clipped(implied, beta)
        losses, lead = self._losses(beta * implied, effects, index, members, policy, beta)
        # The effects have priors, so that the whole is a mode of their posterior given the policy.
        prior = sum(
            (-dist.Normal(0.0, scale).log_prob(effects[name]).sum() for name, (scale, _) in self._effects.items()),
            start=jnp.zeros(()),
        )
        loss = losses.mean() + prior / len(self.model.data)
        told = self._metrics(ratios, lead, index) | {name: value for name, value in effects.items() if not value.shape}
        return loss, self._info(policy, programs, beta, jax.lax.stop_gradient(told))

    def _clipped(self, implied: Array, beta: Any) -> Array:
        """Move the rewards of a pair, nats, towards each other until their difference counts."""
        if self.clip is None:
            return implied
        centre, half = implied.mean(-1, keepdims=True), self.clip / beta / 2
        return centre + jnp.clip(implied - centre, -half, half)

    def _losses(
        self,
        rewards: Array,
        effects: Mapping[str, Array],
        index: Array,
        members: Array,
        policy: ItemLogRatios,
        beta: Any,
    ) -> tuple[Array, Array]:
        """Return the loss of each row, and by how much the reward speaks for what was judged, reward units, [rows]."""
        data = self.model.data
        if self.loss == "kto":
            reference = beta * jnp.maximum(policy.divergence(members[:, 0]), 0.0)
            good = jnp.asarray(self._good)[index]
            weights = (self.desirable_weight, self.undesirable_weight)
            lead = jnp.where(good, 1.0, -1.0) * (rewards[:, 0] - reference)
            return kto_losses(rewards[:, 0], good, reference, *weights), lead
        if self.loss == "ipo":
            outcome = jnp.asarray(data.outcomes, rewards.dtype)[index]
            difference = rewards[:, 0] - rewards[:, 1]
            return ipo_losses(difference / beta, outcome, beta), jnp.sign(outcome - 0.5) * difference
        outcome_given = self.model.outcome_given({**effects, ImplicitScores.site: rewards}, index, lambda _: rewards)
        seen = self.model.outcomes[index]
        losses = likelihood_losses(outcome_given, seen, self.label_smoothing, robust=self.loss == "robust")
        if self._good is not None:
            threshold = effects.get("threshold", rewards[:, 0].mean())
            return losses, jnp.where(jnp.asarray(self._good)[index], 1.0, -1.0) * (rewards[:, 0] - threshold)
        best, worst = (jnp.take_along_axis(rewards, at[index], -1)[:, 0] for at in self._ends)
        return losses, best - worst

    @property
    def _good(self) -> np.ndarray | None:
        """Which items of labels are good, or of ratings above their mean, [rows]; None for comparisons."""
        data = self.model.data
        if data.labels is not None:
            return np.asarray(data.labels == 1)
        return None if data.ratings is None else np.asarray(data.ratings > data.ratings.mean())

    @property
    def _ends(self) -> tuple[Array, Array]:
        """Places of the best and of the worst item of each row, [rows, 1]."""
        ranks = self.model.data.ranks
        first = np.where(ranks >= 0, ranks, np.inf).argmin(-1)
        # The last of the equals, so that a tied pair is not compared with itself.
        last = ranks.shape[1] - 1 - ranks[:, ::-1].argmax(-1)
        return as_whole(first[:, None]), as_whole(last[:, None])

    def _metrics(self, ratios: Array, lead: Array, index: Array) -> dict[str, Array]:
        """Return means over rows: how often the reward agrees with them, by how much, and both log-ratios, nats."""
        data, known = self.model.data, self._good
        tied = np.zeros(len(data), bool) if known is not None else ~(data.ranks > 0).any(-1)
        told = jnp.asarray(~tied, ratios.dtype)[index]
        if known is None:
            chosen, rejected = (jnp.take_along_axis(ratios, at[index], -1).mean() for at in self._ends)
        else:
            good, share = jnp.asarray(known)[index], float(known.mean())
            chosen = jnp.where(good, ratios[:, 0], 0.0).mean() / max(share, 1e-9)
            rejected = jnp.where(good, 0.0, ratios[:, 0]).mean() / max(1 - share, 1e-9)
        right = jnp.where(lead == 0, 0.5, lead > 0)
        count = max(float((~tied).mean()), 1e-9)
        return {
            "accuracy": (told * right).mean() / count,
            "margin": (told * lead).mean() / count,
            "chosen_log_ratio": chosen,
            "rejected_log_ratio": rejected,
        }

    def _info(self, policy: ItemLogRatios, programs: Programs, beta: Any, told: dict[str, Array]) -> Info:
        """Report J, E[R] and KL of the policy where all of its actions are listed, and nan elsewhere."""
        if policy.table is None:
            nan = jnp.asarray(jnp.nan)
            return Info(objective=nan, reward=nan, kl=nan, spread=nan, metrics=told, nonfinite={})
        draws = jax.lax.stop_gradient(policy.table)
        shape = (1, *next(iter(draws.log_q.values())).shape[:1], *programs.structure.context_shape)
        totals = draws.totals(shape[1:])
        info = info_from_draws(
            jax.tree.map(lambda x: x[None], draws), programs, beta, shape, jnp.exp(totals.log_q)[None]
        )
        return info._replace(metrics=info.metrics | told)


def _check_loss(given: "DirectPreference", model: PreferenceModel) -> None:
    """Refuse options that the loss or the data do not take."""
    if not len(model.data):
        raise PreferenceError("the data have no rows; pass at least one judgement")
    if given.loss == "robust" and given.label_smoothing == 0:
        raise PreferenceError(
            "loss='robust' needs the share of flipped labels; pass label_smoothing=0.1, or loss='likelihood'"
        )
    if given.label_smoothing > 0 and model.data.kind not in ("pairs", "labels"):
        raise PreferenceError(f"label_smoothing= is of two outcomes, and the data are {model.data.kind}; leave it out")
    if given.clip is not None and model.data.kind != "pairs":
        raise PreferenceError(f"clip= is of differences of pairs, and the data are {model.data.kind}; leave it out")
    if given.regularizer == "alpha" and given.alpha is None:
        raise PreferenceError("regularizer='alpha' needs its order; pass alpha=0.5, for instance")
    if given.alpha in (0.0, 1.0):
        raise PreferenceError(f"alpha={given.alpha:g} is a KL; use regularizer='kl' (1) or 'forward_kl' (0)")
