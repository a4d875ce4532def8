"""Stable-Baselines3's PPO on CartPole-v1 with the settings of rl-zoo, timed until it reaches the mark."""

import json
import sys
import time

import gymnasium
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

MARK, EPISODES, EVERY = 475.0, 100, 5_000


class UntilMark(BaseCallback):
    """Stops at the mark; the time of evaluation does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.env = gymnasium.make("CartPole-v1")
        self.spent, self.next, self.reached, self.best = 0.0, EVERY, None, 0.0

    def _on_step(self) -> bool:
        if self.num_timesteps < self.next:
            return True
        self.next += EVERY
        before = time.perf_counter()
        mean, _ = evaluate_policy(self.model, self.env, n_eval_episodes=EPISODES, warn=False)
        self.best = max(self.best, float(mean))
        self.spent += time.perf_counter() - before
        if mean >= MARK:
            self.reached = self.num_timesteps
            return False
        return True


def schedule(start: float):
    return lambda left: left * start


def main() -> None:
    seed = int(sys.argv[1])
    np.random.seed(seed)
    watch = UntilMark()
    began = time.perf_counter()
    model = PPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=8, seed=seed),
        n_steps=32,
        batch_size=256,
        gae_lambda=0.8,
        gamma=0.98,
        n_epochs=20,
        ent_coef=0.0,
        learning_rate=schedule(0.001),
        clip_range=schedule(0.2),
        seed=seed,
        device="cpu",
    )
    model.learn(100_000, callback=watch)
    seconds = time.perf_counter() - began - watch.spent
    print(json.dumps({"seconds": seconds, "steps": watch.reached, "best": watch.best}))


if __name__ == "__main__":
    main()
