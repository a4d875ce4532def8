"""A policy and a guide run side by side: the guide draws, the policy scores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions import MaskedDistribution, biject_to, constraints

from bayesrl.compilation.jit import closure_jit, has_tracers
from bayesrl.compilation.random_keys import dummy_key, fold_in, key_from_seed, split
from bayesrl.core.censoring import censored, is_censored
from bayesrl.core.draws import Draws
from bayesrl.core.handlers import SharedKeys, StopValues, full_data
from bayesrl.core.log_ratios import log_prior_ratio
from bayesrl.core.primitives import SiteKind
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import Structure, as_arrays, inspect
from bayesrl.core.support_edges import EdgeMasked
from bayesrl.core.trace import (
    Trace,
    abstract_trace,
    per_context,
    scaled_and_raw_log_prob,
    site_log_prob,
    trace_abstractly,
    trace_program,
)
from bayesrl.core.unsupported import check_arguments, explain_errors
from bayesrl.errors import PolicyError
from bayesrl.typing import Numbers, Params, PRNGKey, Program

_MOST_HELD = 2**27
"""Draws that take more numbers than this in total are made in batches."""

_SHARED = 2**31
_OF_POLICY = 2**16
"""Numbers to fold a key with: for the values that all draws share, and for the policy's draws beside its guide."""


@dataclass(frozen=True)
class Programs:
    """A policy with frozen parameters, a guide, and the arguments of both.

    Attributes:
        policy: the program to fit, with its parameters already substituted.
        guide: the program that draws; None means the policy itself, so that q = π₀.
        structure: of the policy with these arguments.
        args: arguments of both programs.
        transforms: from unconstrained to constrained values of the guide's parameters, by name.
        learned: whether to train the policy's own parameters too, which only a program without
            rewards allows; then they are in `params`, under their own names.
        episodes: plays whole episodes if the environment is not a program; see `Source`.
    """

    policy: Program
    guide: Program | None
    structure: Structure
    args: tuple[Any, ...]
    transforms: Mapping[str, Any] = field(default_factory=dict)
    learned: bool = False
    episodes: Any = None

    def with_args(self, args: tuple[Any, ...]) -> "Programs":
        """Return the same programs with other arguments."""
        args = as_arrays(args)
        return replace(self, args=args, structure=inspect(key_from_seed(0), self.policy, *args))

    def over_all_data(self, *new_args: Any) -> "Programs":
        """Return the same programs over all of their data instead of mini-batches, or over other data.

        The programs inside are the same objects every time, so that compiled code is reused.
        """
        if new_args:
            return self._unbatched.with_args(new_args)
        return self._over_all if self.structure.subsampled else self

    @cached_property
    def _over_all(self) -> "Programs":
        return self._unbatched.with_args(self.args)

    @cached_property
    def _unbatched(self) -> "Programs":
        guide = None if self.guide is None else over_all_data(self.guide)
        return replace(self, policy=over_all_data(self.policy), guide=guide, episodes=None)

    def constrain(self, params: Params) -> Params:
        """Map unconstrained parameters to the values that the guide declares."""
        return {
            name: self.transforms[name](value) if name in self.transforms else value for name, value in params.items()
        }

    def draw(
        self,
        key: PRNGKey,
        params: Params,
        num_draws: int,
        *,
        share: bool = True,
        stopped: tuple[str, ...] = (),
        values: Mapping[str, Numbers] | None = None,
        first: Any = None,
    ) -> Draws:
        """Draw from the guide and score under both programs, [num_draws, ...].

        Args:
            key: consumed whole.
            params: unconstrained parameters of the guide.
            num_draws: number of draws; they are independent, given what they share.
            share: whether all draws share their mini-batch and nature's draws before the first action.
            stopped: action sites whose values carry no gradient.
            values: sites to hold fixed, the same in all draws.
            first: the number of the first draw, traced, so that one key can draw in parts; None means 0.
        """
        shared_key = fold_in(key, _SHARED) if share and self.structure.drawn_before_action else None
        fixed = dict(values or {})

        def one(key: PRNGKey) -> Draws:
            return self._run(key, shared_key, params, fixed, stopped)

        return self._many(one, split(key, num_draws, first))

    def draw_policy(self, key: PRNGKey, params: Params, num_draws: int, *, first: Any = None) -> Draws:
        """Draw from the policy itself, not from the guide, and score under both programs; otherwise as `draw`.

        Each draw has its own mini-batch.
        """

        def one(key: PRNGKey) -> Draws:
            scored = trace_program(FoldedKeys(self.policy, key), *self.args)
            held = {name: scored.sites[name].value for name in self._latent}
            held |= {name: scored.plates[name] for name in self.structure.subsampled}
            return self._draws(self.run_guide(None, None, params, held, ()), scored)

        return self._many(one, split(key, num_draws, first))

    def _many(self, one: Callable[[Any], Any], xs: Any) -> Any:
        """Map over draws: all at once, or in batches of bounded memory if they take too many numbers."""
        at_once = max(1, _MOST_HELD // self.structure.width)
        if len(jax.tree.leaves(xs)[0]) <= at_once:
            return jax.vmap(one)(xs)
        return jax.lax.map(one, xs, batch_size=at_once)

    def score(self, params: Params, draws: Draws) -> Draws:
        """Rescore given draws under the policy and under the guide with these parameters."""
        held = {**draws.sites, **draws.plates}

        def one(values: dict[str, Array]) -> Draws:
            return self._run(None, None, params, values, ())  # no key: every site has a value

        return self._many(one, held)

    def again(self, params: Params, draws: Draws, *, one_batch: bool = False) -> Draws:
        """Rescore the action sites of draws under the guide with these parameters; all else stays.

        Args:
            params: unconstrained parameters of the guide.
            draws: to be scored.
            one_batch: whether all draws have the same mini-batch, which is then read only once.
        """
        batch = {name: index[0] for name, index in draws.plates.items()} if one_batch else {}

        def one(values: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
            drawn = self.run_guide(None, None, params, {**values, **batch}, ())
            return *self._both_scores(drawn), self._guide_metrics(drawn)

        own = {} if one_batch else draws.plates
        log_q, scores, guide_metrics = self._many(one, {**draws.sites, **own})
        return draws.scored(log_q)._replace(scores=scores, guide_metrics=guide_metrics)

    def log_q(self, params: Params, draws: Draws) -> dict[str, Array]:
        """Score the action sites of draws under the guide with these parameters, [draw, *contexts, T]."""
        return self._many(
            lambda values: self._scores(self.run_guide(None, None, params, values, ()), "action"),
            {**draws.sites, **draws.plates},
        )

    def run_guide(
        self,
        key: PRNGKey | None,
        shared_key: PRNGKey | None,
        params: Params,
        values: Mapping[str, Numbers],
        stopped: tuple[str, ...],
    ) -> Trace:
        """Run the guide alone, once; arguments as in `draw`, with a separate key for what draws share.

        Pass no key if every site has a value; a site without one would draw from a fixed dummy key.
        """
        program = self.policy if self.guide is None else self.guide
        if self.guide is not None or self.learned:
            program = handlers.substitute(program, data=self.constrain(params))
        if stopped:
            program = StopValues(program, stopped)
        if values:
            program = handlers.substitute(program, data=dict(values))
        if shared_key is not None:
            # Outer handlers act later: by now the held sites have their values, and take no key.
            program = SharedKeys(program, shared_key, self.structure.drawn_before_action)
        return trace_program(FoldedKeys(program, dummy_key() if key is None else key), *self.args)

    def trace_guide(self, params: Params) -> Trace:
        """Record the guide without computing; see `trace_abstractly`."""
        if self.guide is None or self.learned:
            return trace_abstractly(lambda: self.run_guide(None, None, params, {}, ()))
        return abstract_trace(dummy_key(), self.guide, self.args).trace  # it has no values

    def run_both(self, key: PRNGKey | None, params: Params, values: Mapping[str, Numbers]) -> Draws:
        """Draw once from the guide and score under both programs, [...]; pass no key if every site has a value."""
        return self._run(key, None, params, values, ())

    def _run(
        self,
        key: PRNGKey | None,
        shared_key: PRNGKey | None,
        params: Params,
        values: Mapping[str, Numbers],
        stopped: tuple[str, ...],
    ) -> Draws:
        drawn = self.run_guide(key, shared_key, params, values, stopped)
        latent = {name: drawn.sites[name].value for name in self._latent if name in drawn.sites}
        plates = {name: drawn.plates[name] for name in self.structure.subsampled if name in drawn.plates}
        if self.guide is None:
            scored = drawn
        else:
            own = self.constrain(params) if self.learned else {}
            policy: Callable[..., Any] = handlers.substitute(self.policy, data={**own, **values, **latent, **plates})
            if shared_key is not None:
                # The guide may leave nature out, and the policy then draws it.
                policy = SharedKeys(policy, shared_key, self.structure.drawn_before_action)
            own_key = dummy_key() if key is None else key
            scored = trace_program(FoldedKeys(policy, own_key, first=_OF_POLICY), *self.args)
        return self._draws(drawn, scored)

    @property
    def _latent(self) -> tuple[str, ...]:
        return self.structure.names("action", "environment")

    def _scores(self, trace: Trace, kind: SiteKind) -> dict[str, Array]:
        sites = [trace.sites[name] for name in self.structure.names(kind) if name in trace.sites]
        return {site.name: per_context(site_log_prob(site), site, self.structure.contexts) for site in sites}

    def _both_scores(self, drawn: Trace) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return log q of the action sites, with the scale of handlers and without it."""
        contexts = self.structure.contexts
        names = [name for name in self.structure.actions if name in drawn.sites]
        both = {name: scaled_and_raw_log_prob(drawn.sites[name], contexts) for name in names}
        return {name: log_q for name, (log_q, _) in both.items()}, {name: raw for name, (_, raw) in both.items()}

    def _guide_metrics(self, drawn: Trace) -> dict[str, Array]:
        told = self.structure.names("metric")
        return {
            name: jnp.asarray(site.value)
            for name, site in drawn.sites.items()
            if site.kind == "metric" and name not in told
        }

    def _draws(self, drawn: Trace, scored: Trace) -> Draws:
        scored = self._settled(drawn, scored)
        log_q, scores = self._both_scores(drawn)
        ratios, doubts = self._ratios(drawn, scored, log_q)
        return Draws(
            sites={name: scored.sites[name].value for name in self._latent},
            plates={name: scored.plates[name] for name in self.structure.subsampled},
            log_prior=self._scores(scored, "action"),
            log_q=log_q,
            log_nature=self._scores(scored, "environment"),
            log_likelihood=self._scores(scored, "observed"),
            rewards=self._scores(scored, "reward"),
            metrics={name: jnp.asarray(scored.sites[name].value) for name in self.structure.names("metric")},
            scores=scores,
            guide_metrics=self._guide_metrics(drawn),
            log_behaviour=scores,
            log_ratio=ratios,
            doubt=doubts,
        )

    def _settled(self, drawn: Trace, scored: Trace) -> Trace:
        """Score a site's edge draws under the policy by the guide's rule, so that they cancel or compare as atoms."""
        if drawn is scored:
            return scored
        sites = dict(scored.sites)
        for name in self.structure.actions:
            fn: Any = drawn.sites[name].fn if name in drawn.sites else None
            if is_censored(fn):
                # Intermediates belong to the distribution that drew, so they go with it.
                sites[name] = sites[name]._replace(fn=censored(sites[name].fn), intermediates=None)
                continue
            while isinstance(fn, MaskedDistribution):
                fn = fn.base_dist
            if getattr(fn, "ends", None) is not None:
                sites[name] = sites[name]._replace(fn=EdgeMasked(sites[name].fn, fn.ends), intermediates=None)
        return scored._replace(sites=sites)

    def _ratios(
        self, drawn: Trace, scored: Trace, log_q: dict[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return log π₀ − log q where a direct form is more accurate than the difference, and its rounding error."""
        if drawn is scored:  # 0 exactly; the difference of two infinite densities would be nan
            return {name: jnp.zeros_like(score) for name, score in log_q.items()}, {}
        contexts = self.structure.contexts
        names = [name for name in self.structure.actions if name in drawn.sites]
        found = {name: log_prior_ratio(scored.sites[name], drawn.sites[name], contexts) for name in names}
        ratios = {name: ratio for name, (ratio, _) in found.items() if ratio is not None}
        return ratios, {name: doubt for name, (_, doubt) in found.items() if doubt is not None}


def over_all_data(program: Program) -> Program:
    """Run a program on all of its data, by its own method `over_all_data` if it has one."""
    own: Program | None = getattr(program, "over_all_data", None)
    return own() if own is not None else full_data(program)


def declared_params(key: PRNGKey, program: Program, *args: Any) -> tuple[Params, dict[str, Any]]:
    """Return the parameters that a program declares, unconstrained, and their transforms."""
    values, declared = _declared(key, program, args)
    transforms = {name: biject_to(found) for name, found in declared.items() if found is not constraints.real}
    # NumPy alone would make a Python number float64.
    typed = jax.tree.map(lambda x: x if isinstance(x, Array) else np.asarray(x, jnp.result_type(x)), values)
    inside = {name: typed.pop(name) for name in transforms}
    if inside:
        typed |= closure_jit(
            lambda held: {name: transforms[name].inv(value) for name, value in held.items()}, name="map"
        )(jax.tree.map(jnp.asarray, inside))
    return {name: typed[name] for name in values}, transforms


def freeze(key: PRNGKey, policy: Program, *args: Any) -> tuple[Program, Params]:
    """Freeze a policy's parameters at their declared values, because they are part of the prior.

    Returns:
        The policy with its parameters substituted, and their values.

    Raises:
        PolicyError: the policy does not take these arguments, or does something unsupported.
    """
    check_arguments(policy, args, "the policy", PolicyError)
    with explain_errors("the policy", PolicyError):
        params, _ = _declared(key, policy, args)
    return (handlers.substitute(policy, data=params) if params else policy), params


def _declared(key: PRNGKey, program: Program, args: tuple[Any, ...]) -> tuple[Params, dict[str, Any]]:
    """Return the declared values of a program's parameters, and their constraints."""

    def run() -> Trace:
        return trace_program(FoldedKeys(program, key), *args)

    def declared(trace: Trace) -> tuple[Params, dict[str, Any]]:
        shown = {name: msg["kwargs"].get("constraint", constraints.real) for name, msg in trace.params.items()}
        return {name: msg["value"] for name, msg in trace.params.items()}, shown

    trace, made_with = abstract_trace(key, program, args)
    if trace.params and made_with is not key:
        trace = trace_abstractly(run)  # the cached trace has initial values of another key
    held, shown = declared(trace)
    if has_tracers(shown):
        return declared(run())  # a constraint may depend on values of the run, which only a real run has
    return (closure_jit(lambda: declared(run())[0], name="declare")() if has_tracers(held) else held), shown
