"""Particles of texts: completions that are resampled while they are written, caches and all."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.special import logsumexp

from bayesrl.compilation.callbacks import host_errors
from bayesrl.compilation.jit import ClosureJit
from bayesrl.compilation.random_keys import as_hash_key, fold_in
from bayesrl.core.programs import Programs
from bayesrl.core.rng import category_at
from bayesrl.errors import EngineError
from bayesrl.lm.generation import feed, map_cache, max_rows, model_with_params, move_rows, pad_prompts
from bayesrl.lm.guides import ModelGuide
from bayesrl.lm.policy_draws import with_rewards
from bayesrl.lm.prompted_policy import TEXT, PromptedPolicy
from bayesrl.lm.prompts import Completions
from bayesrl.lm.rewards.base import Reward, evaluate
from bayesrl.lm.rewards.costs import costs_little, runs_elsewhere
from bayesrl.lm.rewards.text import as_reward
from bayesrl.lm.text_distribution import CausalLMDistribution, is_eos
from bayesrl.lm.twisted_model import TwistedGuide
from bayesrl.monte_carlo.particles.engines import ParticleOptions, check_filter, check_precision, register_particles
from bayesrl.monte_carlo.particles.resampling import ancestors, effective_size, fewest_moves, log_mean
from bayesrl.monte_carlo.particles.twists import finite_twist, learned_twist, size_of_twist
from bayesrl.monte_carlo.weighting import ScoredDraws, refuse_worthless
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.evaluations import Evaluations
from bayesrl.typing import Params, PRNGKey

_ROWS_PER_BATCH = 16
"""Particles need no more memory than completions do, and a batch of prompts holds this many times as many of them."""

_TRIED_AT_ONCE = 2**24
"""Tokens in all the texts that looking ahead tries at once."""


@register_particles(PromptedPolicy)
@dataclass(frozen=True)
class TextParticles:
    """Runs particles of a prompted policy along the tokens of its texts.

    Args:
        programs: policy and guide.
        params: of the guide.
        options: sizes, resampling and twist. The twist is "reward", the policy's rewards on the text so far, or a
            reward or a function of the text, as `policy` takes them, reward units; or what `bayesrl.fit_twist` gave,
            which then also proposes. From the prior every next token is tried under a reward, where that costs no
            more than to write one.
    """

    programs: Programs
    params: Params
    options: ParticleOptions

    def __post_init__(self) -> None:
        guide = self.programs.guide
        if guide is not None and not isinstance(guide, ModelGuide):
            raise EngineError(
                f"a {type(guide).__name__} does not write texts; propose from a fit of this policy with a guide of "
                "bayesrl.lm, or from the prior"
            )
        if self.options.twist == "exact":
            raise EngineError(
                "twist='exact' is for programs with a scan; pass twist='reward', or a function of the text so far"
            )
        if isinstance(self.options.twist, Posterior):
            self._check_learned(self.options.twist)

    def _check_learned(self, posterior: Posterior) -> None:
        """Refuse a learned twist that does not fit these texts, or a second proposal.

        Raises:
            EngineError: naming what does not fit.
        """
        learned, _, _ = learned_twist(posterior)
        policy: Any = self.programs.policy
        if not isinstance(learned, TwistedGuide):
            raise EngineError(
                f"the twist was learned of another kind of program ({type(learned).__name__}), and has no values of "
                "texts; pass bayesrl.fit_twist(key, policy, beta=...) of a policy of bayesrl.lm"
            )
        sizes = [int(one.model.config.vocab_size) for one in (learned.policy, policy)]
        if sizes[0] != sizes[1]:
            raise EngineError(
                f"the twist was learned of a model with {sizes[0]} tokens, and this one has {sizes[1]}; fit a twist of "
                "this policy"
            )
        if self.programs.guide is not None:
            raise EngineError(
                "a learned twist of texts proposes every token itself, and proposal= was given too; leave proposal= "
                "out, or pass a function of the text as twist="
            )

    def evaluations_beforehand(self, beta: float | None) -> int:
        """Return how often the program is evaluated before the first run: never."""
        return 0

    def evaluations_per_particle(self) -> int:
        """Return how often a run evaluates the program for each particle: once, however often it looks ahead."""
        return 1

    def run(
        self, key: PRNGKey, beta: float | None, reference: dict[str, Any] | None = None
    ) -> tuple[ScoredDraws, np.ndarray]:
        """Run; see `ParticleEngine`."""
        assert beta is not None
        policy: Any = self.programs.policy
        prompts = policy.resolve_prompts(*self.programs.args)
        size, num = self.options, self.options.num_particles
        count, steps = len(prompts), policy.options["num_steps"]
        tokens, mask = pad_prompts(prompts, policy.model.config.max_length + 1 - steps, closely=True)
        at_once = max(1, min(count, _ROWS_PER_BATCH * max_rows(policy, prompts) // num))
        guide: Any = self.programs.guide
        params, scale = self.params, None
        if isinstance(size.twist, Posterior):
            guide, params, scale = learned_twist(size.twist)
        if reference is not None:
            # Only multinomial resampling leaves the others independent of the particle that must survive.
            size = size._replace(resampling="multinomial")
        twist = scale if scale is not None else self._twist(policy)
        look_ahead = guide is None and isinstance(twist, tuple) and costs_little(policy, prompts, twist)
        if look_ahead:
            at_once = max(1, min(at_once, _TRIED_AT_ONCE // (policy.model.config.vocab_size * steps * num)))
        below = np.asarray(size.resample_below, np.float32)
        # What is traced, as is when to resample, is no part of what is compiled; and a posterior has done its part.
        size = size._replace(twist=None, num_replications=1, resample_below=0.0)
        static = (policy, None if guide is None else guide.origin, twist, look_ahead, prompts.examples, size)
        fixed = (params, np.asarray(beta, np.float32), below, as_hash_key(key))
        run = None
        replications = []
        # One replication after another, so that memory holds the caches of one.
        for replication in range(self.options.num_replications):
            parts = []
            for first in range(0, count, at_once):
                # The last batch repeats the last prompt, so that all share one program; [:count] drops the repeats.
                index = np.minimum(np.arange(first, first + at_once), count - 1).astype(np.int32)
                held = None if reference is None else np.asarray(reference[TEXT])[replication, index]
                batch = (np.asarray(replication, np.int32), tokens[index], mask[index], index, held)
                run = run or _write.prepare(static, *fixed, *batch)
                with host_errors():
                    parts.append(jax.device_get(run(*fixed, *batch)))
            replications.append(jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *parts))
        found = jax.tree.map(lambda *xs: np.stack(xs), *replications)  # [replications, prompts, ...]
        structure = self.programs.structure
        check_filter(structure, num, found.twists.transpose(0, 2, 1), found.sizes.transpose(0, 2, 1), first=0)
        # Each particle of each replication becomes a draw.
        rows = {
            name: np.moveaxis(x, 2, 1).reshape(-1, count, *x.shape[3:])
            for name, x in found._asdict().items()
            if name not in ("twists", "sizes")
        }
        index = np.broadcast_to(np.arange(count), rows["log_q"].shape)
        draws, totals = with_rewards(policy, prompts, index, rows["tokens"], rows["log_q"], rows["log_prior"])
        written = self.options.num_replications * num
        # Twists are rewards of the text so far, after every token; the reward itself is computed once.
        tried = policy.model.config.vocab_size if look_ahead else bool(twist)
        spent = Evaluations(written, written * (1 + steps * tried))
        scored = ScoredDraws.of(draws, totals, structure, spent)
        refuse_worthless(structure, scored)
        check_precision(found.twists, scored.reward / beta)
        return scored, np.asarray(rows["log_weights"], float) + scored.reward / beta

    @staticmethod
    def usual_twist(policy: PromptedPolicy) -> str | None:
        """Return "reward", unless a reward is so costly that other processes compute it."""
        return None if any(map(runs_elsewhere, policy.rewards.values())) else "reward"

    def renewing(self) -> "TextParticles":
        """Return itself: another past would need another cache."""
        return self

    def _twist(self, policy: PromptedPolicy) -> tuple[Reward, ...]:
        given = self.options.twist
        if given is None:
            return ()
        return tuple(policy.rewards.values()) if given == "reward" else (as_reward(given),)


class TextRun(NamedTuple):
    """Particles of some prompts, [prompts, particles, ...].

    Attributes:
        tokens: [prompts, particles, T].
        log_prior: of the text under the reference, nats.
        log_q: under what wrote it, nats.
        log_weights: with the factors that resampling divided out, without the last twist and the reward, nats.
        twists: mean |twist| after each token, nan if one is nan, [prompts, T], nats.
        sizes: effective number of particles after each token, [prompts, T].
    """

    tokens: Any
    log_prior: Any
    log_q: Any
    log_weights: Any
    twists: Any
    sizes: Any


class _Prompts(NamedTuple):
    """Prompts that are answered together: their numbers, tokens and masks, and the records behind all prompts.

    With a reference, [prompts, T], the run is conditional: it is what the first particle of each prompt writes.
    """

    number: Array
    tokens: Array
    mask: Array
    examples: Any
    reference: Array | None


class _Particles(NamedTuple):
    """All particles after a token, [rows, ...]; the rows of a prompt lie behind one another."""

    tokens: Array
    token: Array  # the last one, which the models have not read yet
    caches: list[Any]
    done: Array
    scores: Array  # log π₀ and log q of the text so far, [rows, 2]
    log_weights: Array
    twist: Array  # reward units


@partial(ClosureJit, name="write_particles")
def _write(
    static: Any,
    params: Params,
    beta: Array,
    resample_below: Array,
    key: PRNGKey,
    replication: Array,
    prompt: Array,
    mask: Array,
    index: Array,
    reference: Array | None,
) -> TextRun:
    policy, guide, twist, look_ahead, examples, options = static
    theirs = policy.distribution(policy.model, prompt, mask)
    ours = None if guide is None else policy.distribution(model_with_params(guide.declare, params), prompt, mask)
    own_key = fold_in(key, replication)
    rows = _Prompts(index, prompt, mask, examples, reference)
    writer = _Writer(theirs, ours, twist, options, beta, resample_below, rows, look_ahead=look_ahead)
    contexts, steps, num = len(index), theirs.num_steps, options.num_particles
    zero = jnp.zeros((), jnp.int32)
    # In the loop t begins at 1, so that no later step has this key.
    state = writer.start(fold_in(own_key, 0))
    # Steps that are never reached count as fully effective.
    records = writer.record((jnp.zeros((steps, contexts)), jnp.full((steps, contexts), float(num))), zero, state)

    def write(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        t, state, log_z, records = carry
        state, log_z = writer.resample(fold_in(fold_in(own_key, t), 0), state, log_z)
        state = writer.write(fold_in(fold_in(own_key, t), 1), state, t)
        return t + 1, state, log_z, writer.record(records, t, state)

    carry = (zero + 1, state, jnp.zeros(contexts), records)
    # Texts that have ended wait for the others; once all have, nothing more can happen to a weight.
    _, last, log_z, (twists, sizes) = lax.while_loop(lambda c: (c[0] < steps) & ~c[1].done.all(), write, carry)
    log_weights = log_z + writer.by_prompt(last.log_weights - finite_twist(last.twist) / beta)
    scores = last.scores.reshape(contexts, num, 2)
    tokens = last.tokens.reshape(contexts, num, steps)
    return TextRun(tokens, scores[..., 0], scores[..., 1], log_weights.T, twists.T, sizes.T)


class _Writer:
    """Writes one token of every particle at a time; the rows of a prompt lie behind one another."""

    def __init__(
        self,
        theirs: CausalLMDistribution,
        ours: CausalLMDistribution | None,
        twist: tuple[Reward, ...] | float,
        options: ParticleOptions,
        beta: Array,
        resample_below: Array,
        prompts: _Prompts,
        *,
        look_ahead: bool,
    ) -> None:
        self.theirs, self.ours, self.twist, self.options, self.beta = theirs, ours, twist, options, beta
        self.resample_below, self.look_ahead = resample_below, look_ahead
        self.models = [theirs.model] if ours is None else [theirs.model, ours.model]
        self.prompts, self.num, self.contexts = prompts, options.num_particles, len(prompts.number)

    def by_prompt(self, x: Array) -> Array:
        """Lay numbers of rows out as [particles, prompts]."""
        return x.reshape(self.contexts, self.num).T

    def start(self, key: PRNGKey) -> _Particles:
        """Read the prompts, and write the first token."""
        rows, steps, prompts = self.contexts * self.num, self.theirs.num_steps, self.prompts
        capacity = prompts.tokens.shape[-1] + steps - 1
        read = [feed(m, prompts.tokens, prompts.mask, m.start(capacity), None) for m in self.models]
        caches = [map_cache(lambda x: jnp.repeat(x, self.num, 0), cache) for _, cache in read]
        zero, blank = jnp.zeros(rows), jnp.full((rows, steps), self.theirs.pad, prompts.tokens.dtype)
        state = _Particles(blank, blank[:, 0], caches, jnp.zeros(rows, bool), jnp.zeros((rows, 2)), zero, zero)
        return self._choose(key, state, [jnp.repeat(h[:, -1], self.num, 0) for h, _ in read], jnp.zeros((), jnp.int32))

    def resample(self, key: PRNGKey, state: _Particles, log_z: Array) -> tuple[_Particles, Array]:
        """Draw particles anew in the prompts where few are effective."""
        weights = self.by_prompt(state.log_weights)
        poor = effective_size(weights) < self.resample_below * self.num
        everyone = jnp.broadcast_to(jnp.arange(self.num, dtype=jnp.int32)[:, None], weights.shape)
        parents = jnp.where(poor, ancestors(key, weights, self.options.resampling), everyone)
        parents = parents if self.prompts.reference is None else parents.at[0].set(0)
        # The mean weight moves into log_z, and the particles go on with weight 1: Z stays unbiased.
        log_z = jnp.where(poor, log_z + log_mean(weights), log_z)

        # From numbers of particles within a prompt to rows.
        moves = fewest_moves((parents + jnp.arange(self.contexts) * self.num).T.reshape(-1))
        caches = move_rows(state.caches, moves)
        kept: _Particles = jax.tree.map(lambda x: x[moves.parents], state._replace(caches=[]))
        return kept._replace(caches=caches, log_weights=jnp.where(poor, 0.0, weights).T.reshape(-1)), log_z

    def write(self, key: PRNGKey, state: _Particles, t: Array) -> _Particles:
        """Read the last token of every particle, and write the next."""
        there = jnp.ones((len(state.token), 1), bool)
        read = [
            feed(model, state.token[:, None], there, cache, cache.axes)
            for model, cache in zip(self.models, state.caches, strict=True)
        ]
        return self._choose(key, state._replace(caches=[cache for _, cache in read]), [h[:, 0] for h, _ in read], t)

    def record(self, records: tuple[Array, ...], t: Array, state: _Particles) -> tuple[Array, ...]:
        """Note the mean |twist| and the effective number of particles after a token."""
        new = size_of_twist(self.by_prompt(state.twist / self.beta)), effective_size(self.by_prompt(state.log_weights))
        return tuple(lax.dynamic_update_index_in_dim(x, y, t, 0) for x, y in zip(records, new, strict=True))

    def _choose(self, key: PRNGKey, state: _Particles, hidden: list[Array], t: Array) -> _Particles:
        log_prior, log_q = self._log_probs(hidden)
        later, scores, best = None, log_q, jnp.zeros(len(log_q))
        if self.look_ahead:
            later = self._value_of_each(state.tokens, t, log_q.shape[-1])
            scores = log_prior + (later - finite_twist(state.twist)[:, None]) / self.beta
            best = logsumexp(scores, axis=-1)
            # Where no token is possible the weight is 0, and any choice serves.
            scores = jnp.where(jnp.isfinite(best)[:, None], scores, log_prior)
        drawn = category_at(jax.random.uniform(key, (len(log_q), 1)), scores).astype(state.tokens.dtype)
        if self.prompts.reference is not None:
            drawn = drawn.at[:: self.num].set(self.prompts.reference[:, t].astype(drawn.dtype))
        token = jnp.where(state.done, self.theirs.pad, drawn)
        chosen = jnp.stack([jnp.take_along_axis(x, token[:, None], -1)[:, 0] for x in (log_prior, log_q)], -1)
        chosen = jnp.where(state.done[:, None], 0.0, chosen)
        tokens = lax.dynamic_update_index_in_dim(state.tokens, token, t, 1)
        if later is None:
            twist = self._learned(hidden, token, state) if isinstance(self.twist, float) else self._value(tokens, t)
            # Each twist takes the place of the one before, so that only the last is left in a finished weight.
            gain = chosen[:, 0] - chosen[:, 1] + (twist - finite_twist(state.twist)) / self.beta
        else:
            own = jnp.take_along_axis(later, token[:, None], -1)[:, 0]
            # The weight is the sum over all tokens, whichever was chosen; behind its end nothing adds to a text.
            twist, gain = jnp.where(state.done, state.twist, own), jnp.where(state.done, 0.0, best)
        done = state.done | is_eos(token, self.theirs.eos)
        log_weights = state.log_weights + gain
        return _Particles(tokens, token, state.caches, done, state.scores + chosen, log_weights, twist)

    def _log_probs(self, hidden: list[Array]) -> tuple[Array, Array]:
        """Return log-probabilities of the next token under the reference and under what writes, [rows, V]."""
        prior = jax.nn.log_softmax(self.theirs._logits(hidden[:1]), axis=-1)
        if self.ours is None:
            return prior, prior
        # `ours` lists its own model first, and then the reference, which decides the truncation.
        own = self.ours._logits(hidden[1:] if self.ours.support_model is None else hidden[::-1])
        return prior, jax.nn.log_softmax(own, axis=-1)

    def _learned(self, hidden: list[Array], token: Array, state: _Particles) -> Array:
        """Return the learned twist after a token, [rows], reward units; that of an ended text stays."""
        assert self.ours is not None
        assert isinstance(self.twist, float)
        twists = self.ours.model.twists(hidden[1])
        chosen = jnp.take_along_axis(twists, token[:, None], -1)[:, 0]
        return jnp.where(state.done, state.twist, self.twist * chosen)

    def _value(self, tokens: Array, t: Array) -> Array:
        """Return the twist of the texts so far, [rows], reward units."""
        assert isinstance(self.twist, tuple)
        there = self.theirs.text_mask(tokens) & (jnp.arange(tokens.shape[-1]) <= t)
        number, prompt, mask = (jnp.repeat(x, len(tokens) // self.contexts, 0) for x in self.prompts[:3])
        texts = Completions(number, prompt, mask, tokens, there, self.prompts.examples)
        return sum((evaluate(part, texts) for part in self.twist), jnp.zeros(len(tokens)))

    def _value_of_each(self, tokens: Array, t: Array, vocabulary: int) -> Array:
        """Return the twist of the texts so far with every next token, [rows, V], reward units."""
        tried = jnp.repeat(tokens, vocabulary, 0)
        every = jnp.tile(jnp.arange(vocabulary, dtype=tokens.dtype), len(tokens))
        tried = lax.dynamic_update_index_in_dim(tried, every, t, 1)
        return self._value(tried, t).reshape(len(tokens), vocabulary)
