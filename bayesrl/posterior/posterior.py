"""The fitted posterior: draws, estimates, densities, and the fitted policy as a program."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from jax import Array
from scipy.special import softmax

from bayesrl.arguments import CountAboveOne, CountOrZero, Positive, Untraced, checked
from bayesrl.compilation.jit import to_host, trace_cache
from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.programs import Programs
from bayesrl.display.tables import Displayable, DisplayBlock
from bayesrl.errors import PolicyError
from bayesrl.guides.base import Guide
from bayesrl.posterior.action_sampler import ActionSampler
from bayesrl.posterior.fitted_policy import fitted_policy
from bayesrl.posterior.from_params import judged_posterior, posterior_at
from bayesrl.posterior.marginal import log_marginal
from bayesrl.posterior.mixture_draws import draw_from_mixture
from bayesrl.posterior.regularized import divergence_of, objective_for_choosing
from bayesrl.posterior.sampling import draw_lanes, score_draws
from bayesrl.posterior.summary import summary_blocks
from bayesrl.statistics.averages import kept_estimates, kept_marginal, library_of, mixed, summarise
from bayesrl.statistics.estimates import Estimate, Estimates
from bayesrl.typing import Numbers, Params, PRNGKey, Program, SiteArrays

_OF_MARGINAL = 2**30  # the number to fold a key with for log p(y)


@checked(PolicyError)
@dataclass(frozen=True, repr=False)
class Posterior(Displayable):
    """A fitted policy: an approximation q of the reward-tilted posterior p* ∝ π₀ · exp(R/β).

    Arrays have the leading axes (*beta, restart). There is always an axis for restarts; there is one for
    beta if you passed an array of temperatures to `fit`.

    Attributes:
        beta: temperature, reward units per nat: a float, an array, or None without rewards.
        params: fitted parameters of the guide, unconstrained, [*beta, restart, ...].
        history: per chunk of steps: `step`, `loss` (nats), `objective` and `reward` (reward units),
            `kl` (nats), `spread`, `grad_norm`, `skipped`, and `metrics/NAME`, [chunk, *beta, restart].
        draws: draws from the end of the fit, {site: [*beta, restart, draw, ...]}, NumPy arrays.
        statistics: of these draws: `log_prior`, `total_reward`, `log_q`, `log_weight` (nats; reward
            units for the reward), and `log_likelihood` if the policy has both data and rewards,
            [*beta, restart, draw, *contexts]. log p(y), which J and KL subtract, is in the settings.
        prior_draws: draws of the policy before the fit, {site: [draw, ...]}.
        settings: how it was fitted: seed, steps, names of objective and guide, versions.
        interrupted: whether the fit stopped before it was done.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=500, progress=False)
        >>> posterior.sample(jax.random.key(1), 4)["arm"].shape  # [restart, draw]
        (1, 4)
        >>> round(float(jnp.exp(posterior.log_prob({"arm": jnp.array([2])})[0, 0])), 2)  # e² / (1 + e + e²)
        0.67
    """

    beta: float | np.ndarray | None
    params: Params
    history: dict[str, np.ndarray]
    draws: dict[str, Numbers]
    statistics: dict[str, Numbers]
    prior_draws: dict[str, Numbers]
    settings: dict[str, Any]
    interrupted: bool = False
    programs: Programs | None = None
    mixture: Any = None

    GIVEN_BY: ClassVar[str] = "as bayesrl.fit, bayesrl.load or Posterior.at gives it"

    @classmethod
    @checked(PolicyError, Untraced("call it outside, once for each set of parameters"))
    def at(
        cls,
        policy: Program,
        guide: Guide | None,
        params: Mapping[str, Any],
        *args: Any,
        beta: Positive | None = None,
        unconstrained: bool = False,
    ) -> "Posterior":
        """Make the posterior of a policy trained elsewhere: by your own loop, by NumPyro's SVI, or from a file.

        Pass it wherever a posterior goes: `evidence`, `diagnose`, `compare`, `write_report`. It has no history.

        Args:
            policy: the program, without `tilt`.
            guide: the trained program; None if the policy draws nothing.
            params: by name, as the guide declares them: the result of NumPyro's `svi.get_params(svi_state)`, or the
                `params` of a `State`. Parameters that the policy itself declares are frozen in it, as its prior.
            *args: arguments of both programs.
            beta: temperature, reward units per nat; a number.
            unconstrained: whether `params` are unconstrained values, like those of `Posterior.params` and checkpoints.

        Raises:
            PolicyError, GuideError: the programs do not fit together; a parameter is missing, unknown, of the wrong
                shape, not finite or outside its constraint.

        Example:
            >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax, bayesrl
            >>> from numpyro.infer import SVI, TraceGraph_ELBO
            >>> def bandit():
            ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
            ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
            >>> def guide():
            ...     numpyro.sample("arm", dist.Categorical(logits=numpyro.param("table", jnp.zeros(3))))
            >>> svi = SVI(bayesrl.tilt(bandit, 1.0), guide, optax.adam(0.1), bayesrl.objectives.ReverseKL())
            >>> params = svi.run(jax.random.key(0), 300, progress_bar=False).params
            >>> posterior = bayesrl.Posterior.at(bandit, guide, params, beta=1.0)
            >>> round(float(bayesrl.evidence(jax.random.key(1), posterior).objective.mean), 3)  # log((1 + e + e²) / 3)
            1.309
        """
        posterior: Posterior = posterior_at(cls, policy, guide, params, args, beta, unconstrained=unconstrained)
        return posterior

    def judged_by(self, policy: Program, *args: Any) -> "Posterior":
        """Return the same fit, without its history, beside another policy, whose rewards then count in J and evidence.

        Args:
            policy: a program with the same action sites and the same prior, and rewards of its own.
            *args: its arguments.

        Raises:
            PolicyError, GuideError: the policy does not fit the guide; or the posterior was loaded without its policy.

        Example:
            >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
            >>> def bandit(means):
            ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
            ...     bayesrl.reward("payoff", means[arm])
            >>> proxy, truth = jnp.array([0.0, 1.0, 2.0]), jnp.array([0.0, 1.0, 0.0])
            >>> posterior = bayesrl.fit(jax.random.key(0), bandit, proxy, beta=1.0, num_steps=500, progress=False)
            >>> found = bayesrl.evidence(jax.random.key(1), posterior.judged_by(bandit, truth))
            >>> round(float(found.gap.mean), 3)
            0.474
        """
        posterior: Posterior = judged_posterior(self, policy, args)
        return posterior

    @property
    def num_restarts(self) -> int:
        """Number of restarts."""
        return int(self.history["loss"].shape[-1]) if "loss" in self.history else 1

    @property
    def trained_elsewhere(self) -> bool:
        """Whether its parameters were given to `Posterior.at`, so that no option of `fit` can change them."""
        return self.settings.get("trained") == "elsewhere"

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes (*beta, restart) of the results of `sample` and `estimate`."""
        return (*self._fit_shape[:-1], 1 if self.mixture is not None else self.num_restarts)

    def _lanes(self) -> list[Params]:
        """Parameters of each β and restart."""
        lead = len(self._fit_shape)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:]), to_host(self.params))
        return [jax.tree.map(lambda x, i=i: x[i], flat) for i in range(math.prod(self._fit_shape))]

    @property
    def _fit_shape(self) -> tuple[int, ...]:
        return (*np.shape(self.beta if self.beta is not None else 1.0), self.num_restarts)

    def _programs_for(self, new_args: tuple[Any, ...] = ()) -> Programs:
        if self.programs is None:
            raise PolicyError(
                "this posterior was loaded without its policy, so it can show its draws and history but not draw "
                "anew; load it with bayesrl.load(directory, policy, *args)"
            )
        return self.programs.with_args(new_args) if new_args else self.programs

    def sample(self, key: PRNGKey, num_samples: CountOrZero, *new_args: Any) -> dict[str, Numbers]:
        """Draw from the fitted policy: {site: [*beta, restart, sample, ...]}.

        Args:
            key: consumed whole.
            num_samples: draws per β and restart.
            *new_args: arguments for the program, instead of those of the fit.
        """
        draws, _ = self._draw(key, num_samples, new_args)
        return jax.device_put({**draws.sites, **draws.metrics})

    def totals(self, key: PRNGKey, num_samples: CountOrZero, *new_args: Any) -> Totals:
        """Draw, and return log_prior, log_q, log_likelihood and reward, [*beta, restart, sample, *contexts]."""
        return jax.device_put(self._draw(key, num_samples, new_args)[1])

    def estimate(self, key: PRNGKey, num_samples: CountAboveOne, *new_args: Any) -> Estimates:
        """Estimate J, E[R] and KL(q‖π₀) per context from fresh draws.

        J = β · E_q[w], whose noise vanishes at the optimum. `bayesrl.statistics.definitions` defines each quantity.

        Args:
            key: consumed whole.
            num_samples: draws per β and restart, at least 2.
            *new_args: arguments for the program instead of those of the fit, such as held-out data.

        Returns:
            `Estimates`: each (mean, se) of shape [*beta, restart]; objective and reward in reward
            units, kl in nats, metrics as declared.
        """
        draws, totals = self._draw(key, num_samples, new_args)
        marginal = self.log_marginal(fold_in(key, _OF_MARGINAL), *new_args)
        f = divergence_of(self.settings)
        return summarise(totals, draws.metrics, self.beta, len(self.batch_shape), marginal, f)

    def log_marginal(self, key: PRNGKey, *new_args: Any) -> Estimate | None:
        """Return log p(y) of a policy with both data and rewards, averaged over contexts, nats; None otherwise.

        It is exact if the program is finite. Otherwise it comes from importance weights of draws of prior and fit, and
        is nan if their effective number is too small.

        Args:
            key: consumed whole.
            *new_args: other arguments for the program.
        """
        first = self._lanes()[0]
        programs = self._programs_for()
        return log_marginal(key, programs.over_all_data(*new_args) if new_args else programs, first)

    def log_prob(self, sites: SiteArrays, *args: Any) -> Array:
        """Score values of the action sites, given nature's draws: log q in nats.

        Args:
            sites: action and environment sites, {site: [num, ...]}.
            *args: other arguments for the program.

        Returns:
            [*beta, restart, num, *contexts].
        """
        return jax.device_put(self.scores(sites, *args).log_q)

    def scores(self, sites: SiteArrays, *args: Any) -> Totals:
        """Score values as `log_prob` does, and return all of their scores, [*beta, restart, num, *contexts]."""
        programs = self._programs_for(args)
        latent = programs.structure.names("action", "environment")
        missing = [name for name in latent if name not in sites]
        if missing:
            raise PolicyError(f"log_prob got no value for site {missing[0]!r}; pass every action and environment site")
        held = {name: library_of(value).asarray(value) for name, value in sites.items()}
        for name in latent:
            wanted = programs.structure[name].shape
            if held[name].ndim == 0 or held[name].shape[1:] != wanted:
                raise PolicyError(
                    f"log_prob got shape {held[name].shape} for site {name!r}, whose values have shape {wanted}; "
                    "put the axis of the values first: values[None] for one"
                )
        with trace_cache():
            found = [score_draws(programs, params, held) for params in self._lanes()]
        scores: Totals = jax.tree.map(lambda *x: library_of(x).stack(x).reshape(self._fit_shape + x[0].shape), *found)
        if self.mixture is None:
            return scores
        axis = len(self._fit_shape) - 1
        one = mixed(scores, np.asarray(self.mixture, float), axis)
        return jax.tree.map(lambda x: library_of(x).expand_dims(x, axis).astype(np.float32), one)

    def _draw(self, key: PRNGKey, num_samples: int, new_args: tuple[Any, ...]) -> tuple[Draws, Totals]:
        programs, lanes, shape = self._programs_for(new_args), self._lanes(), self._fit_shape
        keys = split_keys(key, len(lanes) + 1)
        episodes = self._programs_for().episodes
        draws, totals = draw_lanes(keys[:-1], episodes, programs, lanes, num_samples)
        draws, totals = jax.tree.map(lambda x: x.reshape(shape + x.shape[1:]), (draws, totals))
        return (draws, totals) if self.mixture is None else draw_from_mixture(keys[-1], self, programs, draws, totals)

    def objective_by_restart(self) -> np.ndarray:
        """J of each β and restart on the draws it carries, for choosing: up to β·log p(y) if that is unknown."""
        lead = len(self._fit_shape)
        return objective_for_choosing(self.statistics, self.beta, lead, self._marginal, self.settings, self.history)

    @property
    def estimates(self) -> Estimates:
        """J, E[R] and KL(q‖π₀) per context on the draws that it carries, each [*beta, restart].

        Standard errors are over draws. If the fit used mini-batches, each draw is of one of them.
        """
        f = divergence_of(self.settings)
        return kept_estimates(self.statistics, self.beta, len(self._fit_shape), self._marginal, f)

    @property
    def _marginal(self) -> Estimate | None:
        return kept_marginal(self.statistics, self.settings)

    def select(
        self, beta: Positive | None = None, restart: Literal["best", "mixture"] | int | None = None
    ) -> "Posterior":
        """Choose one β, one restart, or the mixture of restarts.

        J is concave in q, so the mixture, weighted by the softmax of J/β, is at least as good as the
        restarts' mean under these weights. It also has the modes that single restarts missed.

        Args:
            beta: a fitted temperature, up to rounding; None keeps all.
            restart: `"best"` by J, `"mixture"`, a number, or None to keep all.

        Raises:
            PolicyError: no such β or restart exists.
        """
        chosen = self if beta is None else self._select_beta(beta)
        if restart is None:
            return chosen
        if restart == "mixture":
            scale = np.asarray(1.0 if chosen.beta is None else chosen.beta, float)[..., None]
            contexts = 1 if chosen.programs is None else chosen.programs.structure.num_contexts
            weights = softmax(chosen.objective_by_restart() * contexts / scale, axis=-1)
            return replace(chosen, mixture=weights)
        if restart == "best":
            index = np.asarray(np.argmax(chosen.objective_by_restart(), axis=-1))
        elif 0 <= restart < chosen.num_restarts:
            index = np.full(chosen._fit_shape[:-1], restart)
        else:
            raise PolicyError(
                f"restart={restart!r} is not among them; use 'best', 'mixture' or 0 to {chosen.num_restarts - 1}"
            )

        def take(x: np.ndarray, axis: int) -> np.ndarray:
            """Take one restart per β, keeping the axis; `axis` is where (*beta, restart) starts."""
            at = index.reshape((1,) * axis + index.shape + (1,) * (x.ndim - axis - index.ndim))
            return np.take_along_axis(x, at, axis=axis + index.ndim)

        return chosen._map(take)

    def _select_beta(self, beta: Any) -> "Posterior":
        betas = np.atleast_1d([] if self.beta is None else self.beta)
        near = np.isclose(betas, beta, rtol=1e-4)
        if not near.any():
            known = ", ".join(f"{b:g}" for b in betas)
            raise PolicyError(f"beta={beta} was not fitted; {f'choose from {known}' if known else 'leave it out'}")
        if not isinstance(self.beta, np.ndarray):
            return self
        index = int(np.argmin(np.abs(betas - beta)))
        mixture = None if self.mixture is None else self.mixture[index]
        one = self._map(lambda x, axis: np.take(x, index, axis=axis))
        return replace(one, beta=float(betas[index]), mixture=mixture)

    def _map(self, change: Callable[[np.ndarray, int], np.ndarray]) -> "Posterior":
        """Change every array that has the axes (*beta, restart); they start at axis 1 in the history."""
        history = {name: x if name == "step" else change(np.asarray(x), 1) for name, x in self.history.items()}
        lead = jax.tree.map(lambda x: change(x, 0), to_host((self.params, self.draws, self.statistics)))
        return replace(self, params=lead[0], draws=lead[1], statistics=lead[2], history=history)

    @property
    def policy(self) -> Program:
        """The fitted policy as an ordinary program, rewards included: you can use it as the next prior.

        Raises:
            PolicyError: there are several β or restarts; `select` one first.
        """
        return fitted_policy(*self.unbatched())

    def unbatched(self) -> tuple[Programs, Params]:
        """The programs and parameters of the only β and restart.

        Raises:
            PolicyError: there are several.
        """
        programs = self._programs_for()
        if math.prod(self._fit_shape) != 1 or self.mixture is not None:
            raise PolicyError(
                f"this posterior holds {self._fit_shape} (beta, restart) fits; "
                "choose one with posterior.select(beta=..., restart='best')"
            )
        return programs, jax.device_put(self._lanes()[0])

    def act(self, key: PRNGKey, *observation: Any) -> Any:
        """Choose actions: run the fitted policy with an observation as its arguments.

        The first call for an observation of a given shape compiles the program. Later calls do not read its other
        inputs, such as globals, again.

        Args:
            key: consumed whole.
            *observation: arguments of the program.

        Returns:
            The value of the action site, or a dictionary if there are several.
        """
        return self._action_sampler(key, *observation)

    @cached_property
    def _action_sampler(self) -> ActionSampler:
        with jax.ensure_compile_time_eval():  # it is cached, so it must hold no tracers of a caller's `jax.jit`
            one = self if math.prod(self._fit_shape) == 1 else self.select(restart="best")
            return ActionSampler(*one.unbatched())

    def _blocks(self) -> Sequence[DisplayBlock]:
        return summary_blocks(self)
