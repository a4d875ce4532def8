"""gymnax's CartPole under a policy that holds the pole: the seconds of some repeats, compiled."""

import json
import sys
import time

import gymnax
import jax
import jax.numpy as jnp


def main() -> None:
    episodes, horizon, repeats = (int(word) for word in sys.argv[1:4])
    environment, params = gymnax.make("CartPole-v1")

    def play(key):
        first, rest = jax.random.split(key)
        observation, state = environment.reset(first, params)

        def step(carry, key):
            observation, state = carry
            choosing, moving = jax.random.split(key)
            pull = 30.0 * (observation[2] + 0.3 * observation[3] + 0.01 * observation[0] + 0.03 * observation[1])
            action = jax.random.categorical(choosing, jnp.stack([-pull, pull]))
            observation, state, reward, *done = environment.step(moving, state, action, params)
            return (observation, state), (reward, done[0])

        _, (rewards, dones) = jax.lax.scan(step, (observation, state), jax.random.split(rest, horizon))
        return rewards.sum(), dones.any()

    run = jax.jit(jax.vmap(play))
    seconds = []
    for repeat in range(repeats + 1):
        keys = jax.random.split(jax.random.key(repeat), episodes)
        began = time.perf_counter()
        total, _ = jax.block_until_ready(run(keys))
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds[1:], "return": float(total.mean())}))


if __name__ == "__main__":
    main()
