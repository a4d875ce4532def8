"""A small valid call of every public name, around which `robustness_fuzz` puts values of every kind."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import bayesrl
from bayesrl import control, lm, preferences
from bayesrl.diagnostics.rank_statistics import Calibration
from benchmarks.robustness_things import Bare, Scorer, Things, bandit, location, stroll

MODULES = (
    "bayesrl",
    "bayesrl.control",
    "bayesrl.control.bandits",
    "bayesrl.guides",
    "bayesrl.lm",
    "bayesrl.lm.rewards",
    "bayesrl.objectives",
    "bayesrl.preferences",
    "bayesrl.report",
    "bayesrl.rewards",
)
"""Packages whose `__all__` is walked."""

type Call = Callable[[Things], dict[str, Any]]

CALLS: dict[str, Call] = {
    "bayesrl.LearningProblem": lambda t: {"environment": t.mdp, "agent": control.BayesianAgent(t.model)},
    "bayesrl.Problem": lambda t: {"policy": bandit, "args": (), "beta": 1.0, "about": "arms"},
    "bayesrl.exact_inference": lambda t: {},
    "bayesrl.nuts_inference": lambda t: {},
    "bayesrl.svi_inference": lambda t: {"num_steps": 2},
    "bayesrl.ReuseDraws": lambda t: {},
    "bayesrl.best_of": lambda t: {"key": t.key, "policy": bandit, "n": 2, "num_samples": 4},
    "bayesrl.calibrate": lambda t: {"key": t.key, "model": location, "args": (jnp.zeros(2),),
                                    "infer": bayesrl.svi_inference(num_steps=1), "num_replications": 20,
                                    "num_samples": 9},
    "bayesrl.compare": lambda t: {"key": t.key, "posteriors": {"a": t.posterior, "b": t.posterior}, "num_samples": 128},
    "bayesrl.compare_engines": lambda t: {"key": t.key, "policy": bandit, "beta": 1.0, "budget": 512,
                                          "engines": ("enumeration", "importance")},
    "bayesrl.coverage": lambda t: {"key": t.key, "posterior": t.posterior, "target": t.exact, "levels": (0.5,),
                                   "num_samples": 100},
    "bayesrl.diagnose": lambda t: {"key": t.key, "posterior": t.posterior, "num_samples": 256},
    "bayesrl.enumerate_posterior": lambda t: {"policy": bandit, "beta": 1.0},
    "bayesrl.environment": lambda t: {"name": "rain", "distribution": dist.Bernoulli(0.5), "observable": True},
    "bayesrl.evidence": lambda t: {"key": t.key, "posterior": t.posterior, "num_samples": 256},
    "bayesrl.fit": lambda t: {"key": t.key, "policy": bandit, "beta": 1.0, "num_steps": 2, "progress": False},
    "bayesrl.fit_twist": lambda t: {"key": t.key, "policy": stroll, "beta": 1.0, "num_steps": 2, "progress": False},
    "bayesrl.frontier": lambda t: {"key": t.key, "posterior": t.sweep, "num_samples": 256},
    "bayesrl.overoptimisation": lambda t: {"key": t.key, "policy": t.unsure, "beta": 1.0, "num_draws": 10},
    "bayesrl.importance": lambda t: {"key": t.key, "policy": bandit, "beta": 1.0, "num_samples": 8},
    "bayesrl.init": lambda t: {"key": t.key, "policy": bandit, "beta": 1.0, "num_steps": 2},
    "bayesrl.step": lambda t: {"key": t.key, "state": bayesrl.init(t.key, bandit, beta=1.0)},
    "bayesrl.load": lambda t: {"directory": t.run_folder, "policy": bandit},
    "bayesrl.log_density": lambda t: {"policy": bandit, "sites": {"arm": jnp.array(1)}, "beta": 1.0},
    "bayesrl.load_learning_problem": lambda t: {"name": "bernoulli_arms"},
    "bayesrl.load_problem": lambda t: {"name": "bernoulli_bandit"},
    "bayesrl.constrain": lambda t: {"key": t.key, "policy": bandit, "targets": {"arm": 0.7}},
    "bayesrl.smc": lambda t: {"key": t.key, "policy": bandit, "beta": 0.5, "num_particles": 4, "num_replications": 2},
    "bayesrl.ReplayDraws": lambda t: {},
    "bayesrl.power": lambda t: {"policy": bandit, "alpha": 2.0},
    "bayesrl.rejection": lambda t: {"key": t.key, "policy": bandit, "beta": 1.0, "num_samples": 4},
    "bayesrl.resume": lambda t: {"directory": t.run_folder, "policy": bandit, "progress": False},
    "bayesrl.reward": lambda t: {"name": "payoff", "value": 1.0},
    "bayesrl.tilt": lambda t: {"policy": bandit, "beta": 1.0},
    "bayesrl.to_datatree": lambda t: {"posterior": t.posterior},
    "bayesrl.use_cache": lambda t: {"directory": "cache"},
    "bayesrl.full_data": lambda t: {"policy": bandit},
    "bayesrl.write_report": lambda t: {"key": t.key, "path": "report.html", "posteriors": t.posterior},
    "control.ActorCritic": lambda t: {},
    "control.ArmsModel": lambda t: {"bandit": t.arms},
    "control.BayesianAgent": lambda t: {"model": t.model},
    "control.CartPole": lambda t: {},
    "control.Duels": lambda t: {"oracle": [0.0, 1.0]},
    "control.DuelsModel": lambda t: {"num_items": 2},
    "control.EnsembleValues": lambda t: {"num_actions": 2},
    "control.GymnasiumSource": lambda t: {"environment": "CartPole-v1", "num_envs": 1},
    "control.JaxEnvironment": lambda t: {"env": Bare(), "actions": dist.Bernoulli(0.5), "params": None},
    "control.KLControlAgent": lambda t: {"beta": 0.5},
    "control.LastLayerValues": lambda t: {"num_actions": 2},
    "control.LinearPolicy": lambda t: {},
    "control.LinearValues": lambda t: {"num_actions": 2},
    "control.LoggedData": lambda t: {"observation": np.zeros(4, int), "action": np.array([0, 1, 1, 0]),
                                     "reward": np.ones(4), "propensity": np.full(4, 0.5)},
    "control.LoggedEnvironment": lambda t: {"data": t.logged},
    "control.NetworkPolicy": lambda t: {},
    "control.Pendulum": lambda t: {},
    "control.Rollout": lambda t: {"environment": control.CartPole(), "horizon": 3},
    "control.TablePolicy": lambda t: {},
    "control.TabularMDP": lambda t: {"successors": np.array([[[1], [0]], [[1], [1]]]),
                                     "probabilities": np.ones((2, 2, 1)), "rewards": np.ones((2, 2, 1)), "horizon": 3},
    "control.TabularModel": lambda t: {"num_states": 3, "num_actions": 2, "horizon": 3},
    "control.TabularOptimum": lambda t: {"mdp": t.mdp},
    "control.as_prior": lambda t: {"posterior": t.control_fit},
    "control.bayes_ucb": lambda t: {},
    "control.boltzmann": lambda t: {"temperature": 0.5},
    "control.check_learning": lambda t: {"key": t.key, "result": t.learned},
    "control.deep_sea": lambda t: {"size": 3},
    "control.episode_sections": lambda t: {"environment": "CartPole-v1"},
    "control.double_thompson": lambda t: {},
    "control.most_informative": lambda t: {},
    "control.pairs_to_ask": lambda t: {"key": t.key, "posterior": t.rewards},
    "control.epsilon_greedy": lambda t: {"epsilon": 0.5},
    "control.evaluate_policy": lambda t: {"mdp": t.mdp, "policy": t.planned.policy, "beta": 0.5},
    "control.from_gymnasium": lambda t: {"environment": "FrozenLake-v1"},
    "control.greedy": lambda t: {},
    "control.grid_world": lambda t: {"rows": ["S.", ".G"], "horizon": 3},
    "control.k_learning": lambda t: {},
    "control.learn": lambda t: {"key": t.key, "environment": t.mdp, "agent": control.BayesianAgent(t.model),
                                "num_episodes": 2, "progress": False},
    "control.learning_maps": lambda t: {"mdp": t.mdp},
    "control.learning_values": lambda t: {"truth": (0.5, 0.5)},
    "control.evaluate_off_policy": lambda t: {"data": t.logged, "probs": np.full((4, 2), 0.5)},
    "control.nuts_posterior": lambda t: {"key": t.key, "result": t.learned, "num_warmup": 1, "num_samples": 10},
    "control.predictive_p_values": lambda t: {"key": t.key, "result": t.learned, "num_replications": 3},
    "control.prior_mixture": lambda t: {"share": 0.5},
    "control.random": lambda t: {},
    "control.river_swim": lambda t: {},
    "control.soft_value_iteration": lambda t: {"mdp": t.mdp, "beta": 0.5},
    "control.squashed_normal": lambda t: {"low": -1.0, "high": 1.0},
    "control.tabular_rollout": lambda t: {"mdp": t.mdp},
    "control.tabular_sections": lambda t: {"mdp": t.mdp},
    "control.thompson": lambda t: {},
    "bandits.BernoulliArms": lambda t: {"num_arms": 2},
    "bandits.GaussianArms": lambda t: {"num_arms": 2},
    "bandits.LinearArms": lambda t: {"num_arms": 2},
    "bandits.LogisticArms": lambda t: {"num_arms": 2},
    "bandits.bayes_optimal_regret": lambda t: {"horizon": 3},
    "bandits.gittins_index": lambda t: {"discount": 0.5},
    "bandits.play_bandit": lambda t: {"key": t.key, "bandit": t.arms, "exploration": control.random(), "num_steps": 3,
                                      "num_runs": 4},
    "guides.AutoTilt": lambda t: {},
    "guides.PolicyGuide": lambda t: {"program": bandit},
    "lm.BertConfig": lambda t: {},
    "lm.FullParameters": lambda t: {},
    "lm.GPT2Config": lambda t: {},
    "lm.LlamaConfig": lambda t: {"vocab_size": 3, "max_length": 4, "width": 4, "depth": 1, "heads": 2, "kv_heads": 1,
                                 "inner": 4},
    "lm.LoRA": lambda t: {},
    "lm.Pretrained": lambda t: {"model": t.writer.model, "tokenizer": t.tokenizer},
    "lm.CausalLMDistribution": lambda t: {"model": t.writer.model, "prompt": jnp.array([1, 2]), "num_steps": 2},
    "lm.Tokenizer": lambda t: {"core": t.tokenizer.core},
    "lm.train_bpe": lambda t: {"texts": ["aba", "ab"], "vocab_size": 260},
    "lm.byte_tokenizer": lambda t: {},
    "lm.char_tokenizer": lambda t: {"text": "ab"},
    "lm.language_modeling": lambda t: {"model": t.writer, "text": "ab ab ab", "length": 3},
    "lm.finetuned": lambda t: {"posterior": t.text_fit},
    "lm.estimate_kl": lambda t: {"key": t.key, "posterior": t.text_fit, "num_samples": 2},
    "lm.classification": lambda t: {"model": t.judge, "texts": ["a", "b"], "labels": ["no", "yes"]},
    "lm.load_pretrained": lambda t: {"source": t.checkpoint},
    "lm.score_records": lambda t: {"reward": len, "records": [{"completion": "a"}]},
    "lm.sft": lambda t: {"model": t.writer, "examples": t.records},
    "lm.policy": lambda t: {"model": t.writer, "prompts": ["a"], "reward": len, "max_new_tokens": 2},
    "lm.encode_prompts": lambda t: {"texts": ["a"], "tokenizer": t.tokenizer},
    "lm.save_adapter": lambda t: {"folder": "adapter", "tuned": t.writer},
    "lm.save_pretrained": lambda t: {"folder": "saved", "model": t.writer.model, "tokenizer": t.tokenizer},
    "lm.train_small_classifier": lambda t: {"key": t.key, "name": "judge", "texts": ["a", "b"], "labels": ["no", "yes"],
                                            "tokenizer": t.tokenizer, "num_steps": 1, "width": 4},
    "lm.train_small_lm": lambda t: {"key": t.key, "name": "writer", "data": "ab ab ab ab ab", "tokenizer": t.tokenizer,
                                    "num_steps": 1, "length": 4, "width": 4, "depth": 1},
    "lm.text_sections": lambda t: {"key": t.key, "posterior": t.text_fit},
    "lm.sample_texts": lambda t: {"key": t.key, "posterior": t.text_fit, "num_samples": 2},
    "rewards.classifier": lambda t: {"pretrained": t.judge, "label": "yes"},
    "rewards.contains": lambda t: {},
    "rewards.exact_match": lambda t: {},
    "rewards.length": lambda t: {},
    "rewards.regex_match": lambda t: {"pattern": "a+"},
    "rewards.number_match": lambda t: {},
    "rewards.text_reward": lambda t: {"fn": len},
    "rewards.token_reward": lambda t: {"fn": lambda tokens, mask: 1.0 * mask.sum()},
    "rewards.sklearn_pipeline": lambda t: {"pipeline": Scorer(), "label": "yes"},
    "objectives.BestOfN": lambda t: {},
    "objectives.ClippedKL": lambda t: {},
    "objectives.FDivergence": lambda t: {"generator": "reverse_kl"},
    "objectives.ForwardKL": lambda t: {},
    "objectives.RegularizedReward": lambda t: {"regularizer": "chi_squared"},
    "objectives.ContrastiveTwist": lambda t: {},
    "objectives.SoftValueRegression": lambda t: {},
    "objectives.TrajectoryBalance": lambda t: {},
    "objectives.ReverseKL": lambda t: {},
    "objectives.NumPyroELBO": lambda t: {"elbo": numpyro.infer.Trace_ELBO()},
    "preferences.DirectPreference": lambda t: {"judgements": t.pairs},
    "preferences.PreferenceData": lambda t: {"kind": "pairs", "items": ({"completion": "a"}, {"completion": "b"}),
                                             "members": np.array([[0, 1]]), "ranks": np.array([[0, 1]])},
    "preferences.TextScores": lambda t: {"model": t.writer},
    "preferences.bradley_terry": lambda t: {"data": t.pairs},
    "preferences.gaussian_ratings": lambda t: {"data": preferences.PreferenceData.of_ratings([0, 1], [3, 4])},
    "preferences.infer": lambda t: {"key": t.key, "model": preferences.bradley_terry(t.pairs), "num_samples": 2},
    "preferences.plackett_luce": lambda t: {"data": t.pairs},
    "preferences.score_inference": lambda t: {"model": preferences.bradley_terry(t.pairs)},
    "preferences.thurstone": lambda t: {"data": t.pairs},
    "preferences.read": lambda t: {"source": [{"prompt": "a", "chosen": "b", "rejected": "c"}]},
    "rewards.uncertain": lambda t: {"posterior": (np.zeros(2), np.eye(2)), "attitude": "pessimistic", "beta": 1.0},
    "report.frontier_figure": lambda t: {"evidence": t.sweep_evidence},
    "report.policy_figure": lambda t: {"posterior": t.posterior},
    "report.save_figures": lambda t: {"directory": ".", "posterior": t.posterior},
    "report.training_figure": lambda t: {"posterior": t.posterior},
    "report.trust_figure": lambda t: {"found": bayesrl.overoptimisation(t.key, t.unsure, n=2, num_draws=10)},
    "report.weights_figure": lambda t: {"posterior": t.posterior},
}  # fmt: skip

METHODS: dict[str, tuple[Callable[[Things], Any], Call]] = {
    "Posterior.sample": (lambda t: t.posterior, lambda t: {"key": t.key, "num_samples": 3}),
    "Posterior.totals": (lambda t: t.posterior, lambda t: {"key": t.key, "num_samples": 3}),
    "Posterior.estimate": (lambda t: t.posterior, lambda t: {"key": t.key, "num_samples": 3}),
    "Posterior.log_prob": (lambda t: t.posterior, lambda t: {"sites": {"arm": jnp.array([1])}}),
    "Posterior.at": (lambda t: t.posterior, lambda t: {"policy": bandit, "guide": t.posterior.programs.guide,
                                                       "params": {"arm$table": np.zeros(3)}, "beta": 1.0}),
    "Posterior.select": (lambda t: t.sweep, lambda t: {"beta": 0.5, "restart": 0}),
    "Posterior.judged_by": (lambda t: t.posterior, lambda t: {"policy": bandit}),
    "Posterior.act": (lambda t: t.posterior, lambda t: {"key": t.key}),
    "WeightedDraws.resample": (lambda t: t.exact, lambda t: {"key": t.key, "num_samples": 3}),
    "LearnResult.action_name": (lambda t: t.learned, lambda t: {"action": 0}),
    "LearnResult.solved_after": (lambda t: t.learned, lambda t: {}),
    "LearnResult.sample": (lambda t: t.learned, lambda t: {"key": t.key, "num_samples": 3}),
    "LearnResult.decide": (lambda t: t.learned, lambda t: {"key": t.key, "observation": 0, "num_samples": 3}),
    "LearnResult.act": (lambda t: t.learned, lambda t: {"key": t.key, "observation": 0}),
    "TabularMDP.replace": (lambda t: t.mdp, lambda t: {}),
    "TabularMDP.from_dense": (lambda t: control.TabularMDP, lambda t: {"transitions": np.ones((1, 2, 1)),
                                                                       "rewards": np.ones((1, 2)), "horizon": 2}),
    "TabularModel.of": (lambda t: control.TabularModel, lambda t: {"mdp": t.mdp}),
    "TabularOptimum.prior_objective": (lambda t: control.TabularOptimum(t.mdp), lambda t: {"beta": 0.5}),
    "TabularOptimum.evaluate": (lambda t: control.TabularOptimum(t.mdp), lambda t: {"posterior": t.control_fit}),
    "PreferenceData.of_pairs": (lambda t: preferences.PreferenceData, lambda t: {"first": [0], "second": [1]}),
    "PreferenceData.of_rankings": (lambda t: preferences.PreferenceData, lambda t: {"rankings": [[0, 1]]}),
    "PreferenceData.of_labels": (lambda t: preferences.PreferenceData, lambda t: {"item": [0], "label": [1]}),
    "PreferenceData.of_ratings": (lambda t: preferences.PreferenceData, lambda t: {"item": [0], "rating": [3]}),
    "PreferenceData.take": (lambda t: preferences.PreferenceData.of_pairs([0], [1]), lambda t: {"rows": [0]}),
    "BanditRuns.band": (lambda t: t.runs, lambda t: {}),
    "Calibration.coverage": (lambda t: Calibration(("a",), np.zeros((3, 1), int), 9, np.full((3, 1), 0.5)),
                             lambda t: {"level": 0.5}),
    "Tokenizer.encode": (lambda t: t.tokenizer, lambda t: {"texts": ["ab"]}),
    "Tokenizer.decode": (lambda t: t.tokenizer, lambda t: {"rows": [[1, 2]]}),
    "Tokenizer.save": (lambda t: t.tokenizer, lambda t: {"folder": "tokens"}),
    "Tokenizer.load": (lambda t: lm.Tokenizer, lambda t: {"folder": t.checkpoint}),
    "Prompts.take": (lambda t: t.prompted.prompts, lambda t: {"chosen": [0]}),
    "Prompts.beside": (lambda t: t.prompted.prompts, lambda t: {"others": t.prompted.prompts}),
    "PromptedPolicy.asked": (lambda t: t.prompted, lambda t: {"prompts": ["a"]}),
    "GPT2.init": (lambda t: lm.GPT2, lambda t: {"key": t.key, "config": t.config}),
    "GPT2Config.from_json": (lambda t: lm.GPT2Config, lambda t: {"json": t.config.to_json()}),
    "BernoulliArms.sample_instances": (lambda t: t.arms, lambda t: {"key": t.key, "num_runs": 2}),
    "BernoulliArms.init": (lambda t: t.arms, lambda t: {"num_runs": 2}),
}  # fmt: skip
"""Methods of objects that users hold."""

RECORDS = (
    "Estimate", "Info", "Interval",
    "Samples", "Section", "Transition",
    "Completions", "Prompts", "GPT2", "Llama", "BertClassifier", "CausalLM",
)  # fmt: skip
"""Trees of arrays: JAX rebuilds them from whatever it maps over them, so their constructors take anything."""
GIVEN = (
    "ConstrainedPolicy", "Evidence", "Posterior", "State", "WeightedDraws", "LearnResult", "RewardPosterior",
    "PromptedPolicy", "Corpus", "Labelled", "ClassifierReward", "Length", "TextReward",
)  # fmt: skip
"""Classes that only the library instantiates."""
ABSTRACT = (
    "Environment", "AutoGuide", "Objective", "Reward",
)  # fmt: skip
"""Base classes, which take no arguments of their own."""


def public() -> Iterator[tuple[str, Any]]:
    """Walk all public names: (room.name, object), each object once."""
    seen: set[int] = set()
    for path in MODULES:
        module = importlib.import_module(path)
        for name in module.__all__:
            found = getattr(module, name)
            if not isinstance(found, ModuleType) and id(found) not in seen:
                seen.add(id(found))
                yield f"{path.rpartition('.')[2]}.{name}", found


def names() -> list[str]:
    """List the names to call: public names that take arguments, and methods."""
    return [*CALLS, *METHODS]


def targets(things: Things, chosen: Sequence[str]) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Yield each call: its name, the callable, and valid arguments by name."""
    found = dict(public())
    for name in chosen:
        if name in CALLS:
            called = _inside(found[name]) if name in INSIDE else found[name]
            yield name, called, CALLS[name](things)
        else:
            holder, call = METHODS[name]
            yield name, getattr(holder(things), name.partition(".")[2]), call(things)


INSIDE = ("bayesrl.environment", "bayesrl.reward")
"""Statements that only programs call."""


def _inside(statement: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(statement)
    def called(**given: Any) -> Any:
        with numpyro.handlers.seed(rng_seed=0):
            return statement(**given)

    return called


def parameters(called: Callable[..., Any]) -> list[str]:
    """List the parameters whose arguments are replaced."""
    found = inspect.signature(called).parameters.values()
    return [p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name[0] != "_"]


def defaults() -> dict[str, str]:
    """Collect the defaults of all parameters, as Python writes them: {name.parameter: default}."""
    known = dict(public())
    classes = {name.rpartition(".")[2]: found for name, found in known.items()}
    called = {name: known[name] for name in CALLS}
    owned = [name for name in METHODS if name.partition(".")[0] in classes]  # users hold others, but do not make them
    called |= {name: getattr(classes[name.partition(".")[0]], name.partition(".")[2]) for name in owned}
    return {
        f"{name}.{param.name}": repr(param.default)
        for name, one in called.items()
        for param in inspect.signature(one).parameters.values()
    }
