"""Arguments for the calls of `robustness_calls`: small programs, fits, environments, models, files."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

import bayesrl
from bayesrl import control, lm, objectives, preferences, rewards
from bayesrl.control import bandits
from bayesrl.control.bandits.simulation import BanditRuns
from bayesrl.control.exploration.beliefs import BetaBelief
from bayesrl.control.planning import PlanResult
from bayesrl.lm.prompted_policy import PromptedPolicy
from bayesrl.lm.text_samples import TextSamples
from bayesrl.statistics.estimates import Estimates
from bayesrl.typing import Program


def bandit() -> None:
    """Draw an arm."""
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
    bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
    numpyro.deterministic("gold", 1.0 * (arm == 1))


def stroll() -> None:
    """Take three steps."""

    def step(x: Any, _: Any) -> tuple[Any, None]:
        x = x + numpyro.sample("step", dist.Bernoulli(0.5))
        bayesrl.reward("height", 1.0 * x)
        return x, None

    scan(step, 0, None, length=3)


def location(y: Any) -> None:
    """Infer a mean."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    with numpyro.plate("datum", len(y)):
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)


class Things:
    """Arguments of calls, each made at its first use."""

    key = jax.random.key(0)
    numbers: Callable[..., Any] = staticmethod(lambda *shape: np.full(shape, 0.5))

    @cached_property
    def posterior(self) -> bayesrl.Posterior:
        """A fit."""
        return bayesrl.fit(self.key, bandit, beta=1.0, num_steps=2, progress=False)

    @cached_property
    def sweep(self) -> bayesrl.Posterior:
        """A fit at two temperatures."""
        return bayesrl.fit(self.key, bandit, beta=jnp.array([0.5, 1.0]), num_steps=2, progress=False)

    @cached_property
    def exact(self) -> bayesrl.WeightedDraws:
        """The enumerated posterior."""
        return bayesrl.enumerate_posterior(bandit, beta=1.0)

    @cached_property
    def evidence(self) -> bayesrl.Evidence:
        """Evidence of the fit."""
        return bayesrl.evidence(self.key, self.posterior)

    @cached_property
    def sweep_evidence(self) -> bayesrl.Evidence:
        """Evidence of the sweep."""
        return bayesrl.evidence(self.key, self.sweep)

    @cached_property
    def mdp(self) -> control.TabularMDP:
        """A finite problem."""
        return control.river_swim(num_states=3, horizon=3)

    @cached_property
    def planned(self) -> PlanResult:
        """Its optimum."""
        return control.soft_value_iteration(self.mdp, 0.5)

    @cached_property
    def model(self) -> control.TabularModel:
        """A model of it, with unknown dynamics."""
        return control.TabularModel.of(self.mdp)

    @cached_property
    def pairs(self) -> preferences.PreferenceData:
        """Judgements of three items."""
        return preferences.PreferenceData.of_pairs([0, 1], [1, 2])

    @cached_property
    def rewards(self) -> preferences.RewardPosterior:
        """What they say of the scores."""
        return preferences.infer(self.key, preferences.bradley_terry(self.pairs), num_samples=4)

    @cached_property
    def unsure(self) -> Program:
        """A bandit whose rewards are not known."""
        reward = rewards.uncertain((np.zeros(3), np.eye(3)))

        def unsure() -> None:
            bayesrl.reward("pay", reward(numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))))

        return unsure

    @cached_property
    def learned(self) -> control.LearnResult:
        """A run of learning."""
        return control.learn(self.key, self.mdp, control.BayesianAgent(self.model), num_episodes=3, progress=False)

    @cached_property
    def control_fit(self) -> bayesrl.Posterior:
        """A fitted policy of it."""
        rollout = control.tabular_rollout(self.mdp)
        return bayesrl.fit(self.key, rollout, beta=0.5, guide=control.TablePolicy(), num_steps=2, progress=False)

    @cached_property
    def arms(self) -> bandits.BernoulliArms:
        """A bandit."""
        return bandits.BernoulliArms(2)

    @cached_property
    def runs(self) -> BanditRuns:
        """Runs on it."""
        return bandits.play_bandit(self.key, self.arms, control.random(), num_steps=3, num_runs=4)

    @cached_property
    def belief(self) -> BetaBelief:
        """A belief about it."""
        return BetaBelief(jnp.array([3.0, 2.0]), jnp.array([2.0, 3.0]))

    @cached_property
    def logged(self) -> control.LoggedData:
        """Logged decisions."""
        return control.LoggedData(np.zeros(4, int), np.array([0, 1, 1, 0]), np.ones(4), np.full(4, 0.5))

    @cached_property
    def tokenizer(self) -> lm.Tokenizer:
        """A tokenizer of three letters."""
        return lm.char_tokenizer("ab ")

    @cached_property
    def config(self) -> lm.GPT2Config:
        """The sizes of a small model."""
        return lm.GPT2Config(vocab_size=self.tokenizer.vocab_size, max_length=6, width=4, depth=1, heads=1)

    @cached_property
    def writer(self) -> lm.Pretrained:
        """A small model that writes."""
        return lm.Pretrained(lm.GPT2.init(self.key, self.config), self.tokenizer)

    @cached_property
    def judge(self) -> lm.Pretrained:
        """A small classifier."""
        config = lm.BertConfig(
            vocab_size=self.tokenizer.vocab_size, max_length=6, width=4, depth=1, heads=1, inner=4, labels=("no", "yes")
        )
        return lm.Pretrained(lm.BertClassifier.init(self.key, config), self.tokenizer)

    @cached_property
    def prompted(self) -> PromptedPolicy:
        """A policy of texts."""
        return lm.policy(self.writer, ["a", "b "], reward=len, max_new_tokens=2)

    @cached_property
    def text_fit(self) -> bayesrl.Posterior:
        """A fit of it."""
        options = {"guide": lm.FullParameters(), "objective": objectives.ReverseKL(num_particles=2)}
        return bayesrl.fit(self.key, self.prompted, beta=1.0, num_steps=1, progress=False, **options)

    @cached_property
    def samples(self) -> TextSamples:
        """Samples of the fit."""
        return lm.sample_texts(self.key, self.text_fit, 2)

    @cached_property
    def run_folder(self) -> str:
        """The folder of a run."""
        folder = str(Path("run").absolute())
        bayesrl.fit(self.key, bandit, beta=1.0, num_steps=2, directory=folder, progress=False)
        return folder

    @cached_property
    def checkpoint(self) -> str:
        """The folder of a checkpoint."""
        folder = str(Path("checkpoint").absolute())
        lm.save_pretrained(folder, self.writer.model, self.tokenizer)
        return folder

    @cached_property
    def lines(self) -> str:
        """A file of records."""
        path = Path("lines.jsonl").absolute()
        path.write_text('{"prompt": "a"}\n', encoding="utf-8")
        return str(path)

    @cached_property
    def estimates(self) -> Estimates:
        """Estimates by hand."""
        one = bayesrl.Estimate(np.array([1.0]), np.array([0.1]))
        return Estimates(one, one, one, {})

    @cached_property
    def records(self) -> list[dict[str, str]]:
        """Records with answers."""
        return [{"prompt": "a", "answer": "b"}, {"prompt": "b", "answer": "a"}]


class Bare:
    """An environment of gymnax's shape."""

    def reset(self, key: Any, params: Any) -> tuple[Any, Any]:
        """Start."""
        return jnp.zeros(2), jnp.zeros(2)

    def step(self, key: Any, state: Any, action: Any, params: Any) -> tuple[Any, ...]:
        """Go on."""
        return state, state, jnp.asarray(1.0), jnp.asarray(False), {}


class Scorer:
    """A pipeline of scikit-learn's shape."""

    classes_ = np.array(["no", "yes"])

    def predict(self, texts: Any) -> np.ndarray:
        """Return classes."""
        return np.full(len(texts), "no")

    def predict_proba(self, texts: Any) -> np.ndarray:
        """Return probabilities of classes."""
        return np.full((len(texts), 2), 0.5)
