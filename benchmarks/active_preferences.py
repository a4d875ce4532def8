"""Which pairs to ask: rules of questions beside random ones, on the same simulated people.

10 items with N(0, 1.5²) scores; a person answers 60 questions by Bradley and Terry's model. Each rule asks the same 40
people; ± is the standard error of the mean over people, and differences are paired. P(best) is the probability that the
posterior gives, at the end, to the item that is truly best. The choice is the item of the greatest posterior mode; its
loss is what its score lacks to the best one, log-odds. Regret is summed over questions: what the better item of each
lacks to the best one. BALD asks about all scores, so it learns about items that nobody would take.
"""

import sys
from typing import Any

import jax
import numpy as np

from benchmarks.results import table, target

ITEMS, QUESTIONS, PEOPLE, SCALE = 10, 60, 40, 1.5


def run() -> str:
    """Let every rule ask the same people."""
    from bayesrl import control

    rules = {
        "random pairs": control.random(),
        "most informative of the best": control.most_informative("best"),
        "most informative of all scores (BALD)": control.most_informative("scores"),
        "double Thompson sampling": control.double_thompson(),
        "Bayes-UCB": control.bayes_ucb(),
    }
    people = np.random.default_rng(0).normal(0, SCALE, (PEOPLE, ITEMS))
    found = {name: np.asarray([_asked(rule, *one) for one in enumerate(people)]) for name, rule in rules.items()}
    rows, gains = [], {}
    for name, values in found.items():
        gain = gains[name] = values - found["random pairs"]
        rows.append([name, *map(_told, values.T), *("" if name == "random pairs" else _told(x) for x in gain.T[:2])])
        print(rows[-1], file=sys.stderr, flush=True)
    header = ["questions", "P(best)", "loss of the choice", "regret", "P(best) gained", "loss gained"]

    def surer(name: str) -> bool:
        return all(_far(sign * gains[name][:, at]) for at, sign in ((0, 1), (2, -1)))

    words = [
        (__doc__ or "").partition("\n\n")[2].strip(),
        *(
            target(
                f"{name}: P(best) higher and regret lower than with random pairs, by 2 standard errors", met=surer(name)
            )
            for name in ("most informative of the best", "double Thompson sampling")
        ),
    ]
    return "\n\n".join([table(header, rows), *words])


def _asked(rule: Any, number: int, scores: np.ndarray) -> tuple[float, float, float]:
    from bayesrl import control

    agent = control.BayesianAgent(control.DuelsModel(ITEMS, scale=SCALE), num_samples=256)
    key = jax.random.key(number)
    result = control.learn(key, control.Duels(scores), agent, exploration=rule, num_episodes=QUESTIONS, progress=False)
    decision = result.decide(jax.random.key(0), 0, num_samples=4000)
    chosen = int(np.argmax(np.asarray(result.bayesian_state().state[0])))
    return float(decision.p_optimal[scores.argmax()]), float(scores.max() - scores[chosen]), float(result.regret[-1])


def _told(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"


def _far(values: np.ndarray) -> bool:
    return bool(values.mean() > 2 * values.std(ddof=1) / len(values) ** 0.5)
