"""Stable-Baselines3's SAC on Pendulum-v1 with the settings of rl-zoo: its time, and its return over 100 episodes."""

import json
import sys
import time

import gymnasium
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy

STEPS, EPISODES = 20_000, 100


def main() -> None:
    seed = int(sys.argv[1])
    environment = gymnasium.make("Pendulum-v1")
    began = time.perf_counter()
    model = SAC("MlpPolicy", environment, learning_rate=1e-3, seed=seed, device="cpu")
    model.learn(STEPS)
    seconds = time.perf_counter() - began
    fresh = gymnasium.make("Pendulum-v1")
    fresh.reset(seed=1000 + seed)
    mean, _ = evaluate_policy(model, fresh, n_eval_episodes=EPISODES, warn=False)
    print(json.dumps({"seconds": seconds, "return": float(mean)}))


if __name__ == "__main__":
    main()
