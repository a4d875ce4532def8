"""torchgfn on the 8 × 8 hypergrid by trajectory balance, with the settings of its simple hypergrid example.

Forward and backward policies are networks of two hidden layers of 256 on one trunk; Adam at .001, and at .1 for log Z;
16 walks a step; gradients clipped to norm 1. The last line of the output is the answer, as JSON: a row per mark, with
the seconds of training alone and the exact L1 distance of the policy's end points from the law of the reward.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version

import torch
from gfn.estimators import DiscretePolicyEstimator
from gfn.gflownet import TBGFlowNet
from gfn.gym import HyperGrid
from gfn.preprocessors import KHotPreprocessor
from gfn.samplers import Sampler
from gfn.utils.modules import MLP

SIZE, BATCH = 8, 16


def make(seed: int) -> tuple[HyperGrid, TBGFlowNet]:
    """Make the grid and the flow network."""
    torch.manual_seed(seed)
    grid = HyperGrid(ndim=2, height=SIZE, reward_fn_kwargs={"R0": 0.1, "R1": 0.5, "R2": 2.0}, store_all_states=True)
    seen = KHotPreprocessor(height=SIZE, ndim=2)
    forward = MLP(input_dim=seen.output_dim, output_dim=grid.n_actions)
    backward = MLP(input_dim=seen.output_dim, output_dim=grid.n_actions - 1, trunk=forward.trunk)
    return grid, TBGFlowNet(
        pf=DiscretePolicyEstimator(forward, grid.n_actions, preprocessor=seen, is_backward=False),
        pb=DiscretePolicyEstimator(backward, grid.n_actions, preprocessor=seen, is_backward=True),
        init_logZ=0.0,
    )


@torch.no_grad()
def distance(grid: HyperGrid, network: TBGFlowNet) -> float:
    """Sum |q(x) − R(x)/ΣR| over the cells, with q from the probabilities of all steps."""
    cells = [(x, y) for x in range(SIZE) for y in range(SIZE)]
    states = grid.states_from_tensor(torch.tensor(cells))
    chances = network.pf.to_probability_distribution(states, network.pf(states)).probs.double()
    law = grid.reward(states).double()
    reached = torch.zeros(len(cells), dtype=torch.float64)
    reached[0] = 1.0
    for index, (x, y) in enumerate(cells):
        if x < SIZE - 1:
            reached[index + SIZE] += reached[index] * chances[index, 0]
        if y < SIZE - 1:
            reached[index + 1] += reached[index] * chances[index, 1]
    return (reached * chances[:, 2] - law / law.sum()).abs().sum().item()


def train(seed: int, marks: list[int], epsilon: float) -> list[dict[str, float]]:
    """Train to the last mark, in steps, and look at each; looking does not count."""
    grid, network = make(seed)
    sampler = Sampler(estimator=network.pf)
    optimizer = torch.optim.Adam(network.pf_pb_parameters(), lr=1e-3)
    optimizer.add_param_group({"params": network.logz_parameters(), "lr": 1e-1})
    rows, seconds, used, states = [], 0.0, 0.0, 0
    for step in range(1, marks[-1] + 1):
        began, began_work = time.perf_counter(), time.process_time()
        walks = sampler.sample_trajectories(
            grid, n=BATCH, save_logprobs=False, save_estimator_outputs=False, epsilon=epsilon
        )
        optimizer.zero_grad()
        loss = network.loss_from_trajectories(grid, walks, recalculate_all_logprobs=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        seconds += time.perf_counter() - began
        used += time.process_time() - began_work
        states += int(walks.terminating_idx.sum())
        if step in marks:
            found = {"walks": step * BATCH, "states": states, "seconds": seconds, "cpu_seconds": used}
            rows.append({**found, "distance": distance(grid, network)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--marks", type=int, nargs="+", default=[1000])
    parser.add_argument("--epsilon", type=float, default=0.0, help="share of uniform actions")
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small are faster on one
    rows = train(options.seed, sorted(options.marks), options.epsilon)
    told = {name: version(name) for name in ("torch", "torchgfn")}
    print(json.dumps({"rows": rows, "threads": torch.get_num_threads(), "versions": told}))


if __name__ == "__main__":
    main()
