"""Direct preference optimisation: fixed points by enumeration, and a GPT-2 on the pairs of TRL's DPOTrainer.

The bandit has 5 arms of uneven prior mass, whose judgements have exactly the shares of Bradley–Terry with the
strengths 1 to 5, so that the optimum is known: p* of the logarithm of the strength; for robust DPO on labels of which
a quarter was flipped the same; for IPO p* of the chance to win against an arm drawn uniformly; for other regularisers
than KL their own optimum by `enumerate_posterior`. Each fit has 3,000 steps of the default optimiser; "off" is the
greatest difference of a probability from that optimum.

The GPT-2 has 2 layers × 128, 98 tokens and random weights; prompts have 4 to 8 characters and answers 12 to 24.
Vowels earn ½ each, and Bradley–Terry labels the pairs. Both train all parameters from one checkpoint, three times
over one file of 12,288 pairs in batches of 32, β = .1, by Adam from the rate 1e-3 linearly to 0, gradients clipped to
norm 1. Accuracy is the share of 8,192 held-out pairs whose chosen answer has the greater implicit reward, measured
for both by the peer's script from the saved models. TRL has its default, which scores every pair under the reference
in every step; its other option, to do so once beforehand, saves that in all passes but the first. Its threads spin or
sleep while they wait, whichever is faster in 16 steps. A step is the median of the run. All of TRL's time is that of
`train()`, without imports and the making of the trainer; ours is that of all of `fit`: checks, reference scores,
compilation, steps, and draws of the result. Seconds of the processor tell ratios on a machine that others use too.
"""

import json
import os
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import bayesrl
from bayesrl import lm, preferences
from benchmarks.peers import TRL, run_peer
from benchmarks.results import table, target

SCRIPT = "peer_trl_dpo.py"
STRENGTH = np.arange(1.0, 6.0)
PRIOR = np.array([0.3, 0.25, 0.2, 0.15, 0.1])
FLIPPED = 4
CHARACTERS = "".join(chr(32 + index) for index in range(95))
LETTERS = "etaoin shrdlucmfwypvbgkjqxz"
STEPS, TRIED, BATCH, BETA, RATE = 1_152, 16, 32, 0.1, 1e-3
TRAINED, HELD_OUT = 12_288, 8_192
MOST = 24


def run() -> str:
    """Fit bandits to their fixed points, and a language model beside TRL."""
    return "\n\n".join([(__doc__ or "").partition("\n\n")[2].strip(), *fixed_points(), *beside_trl()])


# ---- fixed points --------------------------------------------------------------------------------


def bandit() -> None:
    """Earn the logarithm of an arm's strength."""
    arm = numpyro.sample("arm", dist.Categorical(probs=jnp.asarray(PRIOR)))
    bayesrl.reward("log_strength", jnp.log(jnp.asarray(STRENGTH))[arm])


def judged(flipped: int = 0, games: int = 0) -> preferences.PreferenceData:
    """Make judgements with exactly the shares of Bradley–Terry, after 1 in `flipped` was turned."""
    rows = []
    for i, j in combinations(range(len(STRENGTH)), 2):
        a, b = int(STRENGTH[i]), int(STRENGTH[j])
        won, lost = ((flipped - 1) * a + b, (flipped - 1) * b + a) if flipped else (a, b)
        times = games // (won + lost) if games else 1
        rows += [(i, j, 1)] * (won * times) + [(i, j, 0)] * (lost * times)
    return preferences.PreferenceData.of_pairs(*np.asarray(rows).T)


def fixed_points() -> list[str]:
    """Compare fits with their optima."""
    wins = (STRENGTH[:, None] / (STRENGTH[:, None] + STRENGTH)).mean(1)
    direct = preferences.DirectPreference
    games = int(np.lcm.reduce([int(a + b) for a, b in combinations(STRENGTH, 2)]))
    cases: list[tuple[str, Any, Any]] = [
        ("DPO", direct(judged()), lambda beta: _tilted(np.log(STRENGTH), beta)),
        (
            "robust DPO, ¼ flipped",
            direct(judged(FLIPPED), loss="robust", label_smoothing=1 / FLIPPED),
            lambda beta: _tilted(np.log(STRENGTH), beta),
        ),
        ("IPO", direct(judged(games=games), loss="ipo"), lambda beta: _tilted(wins, beta)),
    ]
    for name, options in (
        ("χPO (χ² + KL)", {"regularizer": "chi_squared_kl"}),
        ("DPO with Jensen–Shannon", {"regularizer": "jensen_shannon_sum"}),
    ):
        cases.append((name, direct(judged(), **options), lambda beta, options=options: _enumerated(beta, **options)))
    rows, worst = [], {}
    betas = np.array([0.3, 1.0, 3.0])
    for name, objective, optimum in cases:
        posterior = bayesrl.fit(
            jax.random.key(0), bandit, beta=betas, objective=objective, num_steps=3000, progress=False
        )
        probs = np.exp(np.asarray(posterior.log_prob({"arm": jnp.arange(5)}), float))[:, 0]
        off = [float(np.abs(p - optimum(beta)).max()) for p, beta in zip(probs, betas, strict=True)]
        rows.append([name, *(" ".join(f"{x:.5f}" for x in optimum(betas[1])).split()), *(f"{x:.1e}" for x in off)])
        worst[name] = max(off)
        print(rows[-1], file=sys.stderr, flush=True)
    header = ["", *(f"q({arm}), β = 1" for arm in range(5)), *(f"off, β = {beta:g}" for beta in betas)]
    return [
        table(header, rows),
        target("DPO ends at p* to 5 digits, at every β", met=worst["DPO"] < 5e-6),
        target("all others end at their own optimum to 5 digits", met=max(worst.values()) < 5e-6),
    ]


def _tilted(reward: np.ndarray, beta: float) -> np.ndarray:
    weight = PRIOR * np.exp((reward - reward.max()) / beta)
    return np.asarray(weight / weight.sum())


def _enumerated(beta: float, **options: Any) -> np.ndarray:
    weighted = bayesrl.enumerate_posterior(bandit, beta=float(beta), **options)
    return np.exp(np.asarray(weighted.log_weights, float)).reshape(-1)


# ---- beside TRL ----------------------------------------------------------------------------------


def beside_trl() -> list[str]:
    """Train one model by both."""
    tokenizer = lm.char_tokenizer(CHARACTERS)
    config = lm.GPT2Config(vocab_size=tokenizer.vocab_size, max_length=40, width=128, depth=2, heads=4)
    model = lm.GPT2.init(jax.random.key(0), config)
    with tempfile.TemporaryDirectory() as folder:
        start, saved, theirs = (Path(folder) / name for name in ("start", "fit", "trl"))
        lm.save_pretrained(start, model, tokenizer)
        files = {"train": Path(folder) / "train.jsonl", "held_out": Path(folder) / "held_out.jsonl"}
        rng = np.random.default_rng(0)
        for (name, path), count in zip(files.items(), (TRAINED, HELD_OUT), strict=True):
            path.write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs(rng, count)), encoding="utf-8")
            print(f"{name}: {count} pairs", file=sys.stderr, flush=True)
        command = ["--model", str(start), "--pairs", str(files["train"]), "--save", str(theirs)]
        command += ["--batch", str(BATCH), "--beta", str(BETA), "--rate", str(RATE)]
        tried = {
            policy: run_peer(TRL, SCRIPT, *command, "--steps", str(TRIED), variables={"OMP_WAIT_POLICY": policy})
            for policy in ("active", "passive")
        }
        waiting = min(tried, key=lambda policy: tried[policy]["step_seconds"])
        print(waiting, tried, file=sys.stderr, flush=True)
        peer = run_peer(TRL, SCRIPT, *command, "--steps", str(STEPS), variables={"OMP_WAIT_POLICY": waiting})
        print(peer, file=sys.stderr, flush=True)
        own = train(lm.Pretrained(model, tokenizer), files["train"])
        print({name: value for name, value in own.items() if name != "posterior"}, file=sys.stderr, flush=True)
        lm.save_pretrained(saved, lm.finetuned(own["posterior"]).model)
        found = [
            run_peer(TRL, SCRIPT, "--evaluate", str(one), "--reference", str(start), "--pairs", str(files["held_out"]))
            for one in (theirs, saved)
        ]
    return told(peer, own, found)


def make_pairs(rng: np.random.Generator, count: int) -> list[dict[str, str]]:
    """Draw pairs of texts, and label them by Bradley–Terry with half a vowel's worth each."""

    def text(least: int, most: int) -> str:
        return "".join(rng.choice(list(LETTERS), rng.integers(least, most + 1)))

    pairs = []
    while len(pairs) < count:
        prompt, answers = text(4, 8), [text(12, MOST), text(12, MOST)]
        gold = [sum(letter in "aeiou" for letter in answer) / 2 for answer in answers]
        first = rng.random() < 1 / (1 + np.exp(gold[1] - gold[0]))
        chosen, rejected = answers if first else answers[::-1]
        if chosen != rejected:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def train(model: lm.Pretrained, path: Path) -> dict[str, Any]:
    """Fit, and time it."""
    data = preferences.read(path)
    policy = lm.policy(
        model,
        [data.items[0]["prompt"]],
        reward=lm.rewards.token_reward(lambda tokens, mask: mask.sum()),
        max_new_tokens=MOST + 1,
    )
    jax.clear_caches()
    rows: list[tuple[float, float, int]] = []
    began, used = time.perf_counter(), time.process_time()
    posterior = bayesrl.fit(
        jax.random.key(0),
        policy,
        beta=BETA,
        guide=lm.FullParameters(),
        objective=preferences.DirectPreference(data, batch_size=BATCH),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(RATE, 0.0, STEPS))),
        num_steps=STEPS,
        callback=lambda row: rows.append((time.perf_counter(), time.process_time(), int(row["step"]))) and None,
        progress=False,
    )
    whole = {"all": time.perf_counter() - began, "all_cpu": time.process_time() - used}
    seconds, work, done = (np.diff([row[at] for row in rows]) for at in range(3))
    step = {"step": float(np.median(seconds / done)), "step_cpu": float(np.median(work / done))}
    return {"posterior": posterior, **step, **whole}


def told(peer: dict[str, Any], own: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    """Write the comparison."""
    pairs = BATCH * STEPS
    theirs, ours = (one["accuracy"] for one in found)
    error = np.sqrt(theirs * (1 - theirs) / HELD_OUT)
    times = [
        ("a step of 32 pairs", peer["step_seconds"], own["step"], 1e3, "ms"),
        ("the same, seconds of the processor", peer["step_cpu_seconds"], own["step_cpu"], 1e3, "ms"),
        (f"{pairs:,} pairs, compilation included", peer["train_seconds"], own["all"], 1.0, "s"),
        ("the same, seconds of the processor", peer["train_cpu_seconds"], own["all_cpu"], 1.0, "s"),
    ]
    rows = [
        [what, f"{scale * a:.1f} {unit}", f"{scale * b:.1f} {unit}", f"{a / b:.2f}×"]
        for what, a, b, scale, unit in times
    ]
    rows += [
        ["pairs a second, compilation left out", f"{BATCH / times[0][1]:.0f}", f"{BATCH / times[0][2]:.0f}", ""],
        ["held-out accuracy", f"{theirs:.4f}", f"{ours:.4f}", f"{ours - theirs:+.4f}"],
        ["held-out loss, nats", f"{found[0]['loss']:.4f}", f"{found[1]['loss']:.4f}", ""],
    ]
    left_out, left_out_cpu, included, included_cpu = (a / b for _, a, b, _, _ in times)
    load = f"{os.getloadavg()[2]:.0f} processes shared the {os.cpu_count()} cores"
    return [
        table(["", "TRL", "bayesrl", "ratio"], rows),
        f"The accuracy of either has a standard error of {error:.4f}.",
        target("implicit-reward accuracy within .01 of TRL's", met=abs(ours - theirs) <= 0.01),
        target(
            "at least 3× its examples a second, compilation left out",
            met=left_out >= 3,
            why_not=f"by the clock {left_out:.2f}×, in seconds of the processor {left_out_cpu:.2f}×; {load}",
        ),
        target(
            "at least 1.5× with compilation",
            met=included >= 1.5,
            why_not=f"by the clock {included:.2f}×, in seconds of the processor {included_cpu:.2f}×; {load}",
        ),
    ]
