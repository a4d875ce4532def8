"""TRL's RLOO and GRPO, and transformers' GPT-2, on a small character model that is rewarded for vowels.

Token i < 95 is chr(32 + i), 95 is the pad, 96 the end and 97 the beginning, which alone is the prompt. Every
completion has 16 tokens. A policy q is worth J = E[R] - beta * KL(q || q0): R is a quarter of the number of vowels,
and q0 is the policy that training began with. The last line of the output is the answer, as JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, TrainerCallback

CHARACTERS = [chr(32 + i) for i in range(95)]
PAD, EOS, BOS = 95, 96, 97
VOCABULARY = 98
NEVER = VOCABULARY
"""An end token that the model cannot write, so that every completion has its full length."""

VOWELS = frozenset(CHARACTERS.index(letter) for letter in "aeiou")
LENGTH, BATCH, CONTEXT = 16, 64, 32
SCALE, BETA = 4.0, 0.1
WARM_UP, REPEATS, SKIPPED = 3, 20, 10
MARKS = (50, 100, 200, 300)
FEW, MANY = 1_024, 4_096
EVALUATION_SEED = 1_000_003


def make_checkpoint(folder: Path, seed: int) -> None:
    """Write a GPT-2 with random weights, as transformers draws them."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


def load(folder: Path) -> GPT2LMHeadModel:
    """Read a checkpoint in single precision, ready for evaluation."""
    return GPT2LMHeadModel.from_pretrained(str(folder), dtype=torch.float32).eval()


def without_end(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Remove the end token of a model, because TRL ends completions at any end token that the model declares."""
    model.config.eos_token_id = model.generation_config.eos_token_id = NEVER
    return model


def sample(model: GPT2LMHeadModel, count: int) -> torch.Tensor:
    """Draw completions from the full softmax; the prompt is the first column."""
    prompt = torch.full((count, 1), BOS)
    settings = GenerationConfig(
        max_new_tokens=LENGTH,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_cache=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=NEVER,
    )
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    if tokens.shape != (count, 1 + LENGTH):
        raise RuntimeError(f"completions of {tokens.shape[1] - 1} tokens instead of {LENGTH}")
    return tokens


def log_probabilities(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    """Compute the log-probability of each completion."""
    seen = tokens[:, :-1]
    logits = model(seen, attention_mask=torch.ones_like(seen)).logits
    return torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None]).sum((1, 2))


def count_vowels(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward completions, given as tokens by TRL."""
    return [sum(token in VOWELS for token in tokens) / SCALE for tokens in completion_ids]


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Compute the mean of independent values and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, reference: GPT2LMHeadModel, count: int, seed: int) -> dict[str, float]:
    """Estimate J, E[R] and the KL from fresh samples, and leave the caller's random generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + EVALUATION_SEED)
        tokens = sample(model, count)
    reward = torch.tensor(count_vowels(tokens[:, 1:].tolist()), dtype=torch.float64)
    ratio = (log_probabilities(model, tokens) - log_probabilities(reference, tokens)).double()
    answer = {}
    for name, values in (("J", reward - BETA * ratio), ("reward", reward), ("kl", ratio)):
        answer[name], answer[f"{name}_error"] = mean_and_error(values)
    return answer


class Watch(TrainerCallback):
    """Times the steps and evaluates at the marks; the time of evaluation does not count."""

    def __init__(self, folder: Path, marks: tuple[int, ...], seed: int) -> None:
        self.reference, self.plain = load(folder), load(folder)
        self.marks, self.seed = marks, seed
        self.steps: list[float] = []
        self.work: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.last, self.spent, self.used = 0.0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the watch."""
        self.last, self.used = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Record the time since the last step, and evaluate at a mark."""
        before = time.perf_counter()
        self.steps.append(before - self.last)
        self.work.append(time.process_time() - self.used)
        if state.global_step in self.marks:
            self.plain.load_state_dict(model.state_dict())
            found = evaluate(self.plain, self.reference, FEW, self.seed + state.global_step)
            self.curve.append({"steps": state.global_step, "seconds": sum(self.steps), **found})
            self.spent += time.perf_counter() - before
        self.last, self.used = time.perf_counter(), time.process_time()


def make_tokenizer() -> Any:
    """Make a tokenizer that knows the prompt and can spell completions; the model never writes its end token."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = [*CHARACTERS, "<pad>", "<eos>", "<bos>", "<never>"]
    roles = {"pad_token": words[PAD], "bos_token": words[BOS], "eos_token": words[NEVER]}
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[PAD]))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **roles)


def make_trainer(options: argparse.Namespace, output: str, watch: Watch) -> Any:
    """Make a TRL trainer that only trains."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer, config = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}[options.trainer]
    special = {"scale_rewards": options.scale} if options.trainer == "grpo" else {}
    settings = config(
        output_dir=output,
        seed=options.seed,
        use_cpu=True,
        bf16=False,
        learning_rate=options.rate,
        lr_scheduler_type=options.schedule,
        max_grad_norm=options.clip,
        weight_decay=0.0,
        max_steps=options.steps,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=BATCH,
        num_iterations=1,
        max_completion_length=LENGTH,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=BETA,
        disable_dropout=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **special,
    )
    return trainer(
        model=without_end(load(options.model)),
        reward_funcs=count_vowels,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["<bos>"] * options.steps}),
        processing_class=make_tokenizer(),
        callbacks=[watch],
    )


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train with TRL, time it, and evaluate the result."""
    watch = Watch(options.model, MARKS, options.seed)
    with tempfile.TemporaryDirectory() as output:
        began = time.perf_counter()
        trainer = make_trainer(options, output, watch)
        ready = time.perf_counter()
        trainer.train()
        done = time.perf_counter()
    watch.plain.load_state_dict(trainer.model.state_dict())
    if options.save:
        watch.plain.save_pretrained(options.save)
    return {
        "trainer": options.trainer,
        "rate": options.rate,
        "schedule": options.schedule,
        "clip": options.clip,
        "scale": options.scale if options.trainer == "grpo" else None,
        "steps": options.steps,
        "seed": options.seed,
        "step_seconds": statistics.median(watch.steps[SKIPPED:]),
        "step_cpu_seconds": statistics.median(watch.work[SKIPPED:]),
        "train_seconds": done - ready - watch.spent,
        "setup_seconds": ready - began,
        "curve": watch.curve,
        "final": evaluate(watch.plain, watch.reference, MANY, options.seed),
    }


def time_parts(folder: Path, seed: int) -> dict[str, float]:
    """Time generation, the forward pass and the backward pass of one batch."""
    torch.manual_seed(seed)
    model = load(folder)
    seconds: dict[str, list[float]] = {"generate": [], "score": [], "forward": [], "backward": []}
    for _ in range(WARM_UP + REPEATS):
        model.zero_grad()
        times = [time.perf_counter()]
        tokens = sample(model, BATCH)
        times.append(time.perf_counter())
        with torch.no_grad():
            log_probabilities(model, tokens)
        times.append(time.perf_counter())
        loss = -log_probabilities(model, tokens).mean()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        for name, start, end in zip(seconds, times, times[1:], strict=False):
            seconds[name].append(end - start)
    return {f"{name}_seconds": statistics.median(values[WARM_UP:]) for name, values in seconds.items()}


def read_options() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the checkpoint to start from")
    parser.add_argument("--seed", type=int, default=0)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--make", type=Path, metavar="FOLDER", help="write a random checkpoint")
    mode.add_argument("--trainer", choices=("rloo", "grpo"), help="train with TRL")
    mode.add_argument("--generate", action="store_true", help="time generation, forward and backward")
    mode.add_argument("--evaluate", type=Path, metavar="FOLDER", help="evaluate a checkpoint")
    parser.add_argument("--reference", type=Path, help="the initial policy for --evaluate")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--schedule", default="constant", help="TRL's learning-rate schedule")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient; 0 does not clip")
    parser.add_argument("--scale", choices=("none", "group", "batch"), default="none", help="GRPO's scaled rewards")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where to write the trained model")
    options = parser.parse_args()
    if (options.trainer or options.generate) and not options.model:
        parser.error("--trainer and --generate need --model")
    if options.trainer and options.steps <= SKIPPED:
        parser.error(f"--steps must be more than the {SKIPPED} that the timing leaves out")
    if options.evaluate and not options.reference:
        parser.error("--evaluate needs --reference")
    return options


def versions() -> dict[str, str]:
    """Name the measured versions."""
    python = ".".join(map(str, sys.version_info[:3]))
    packages = ("torch", "transformers", "trl", "datasets", "accelerate", "tokenizers")
    return {"python": python, **{name: version(name) for name in packages}}


def main() -> None:
    """Run the command."""
    options = read_options()
    if options.make:
        make_checkpoint(options.make, options.seed)
        answer: dict[str, Any] = {"made": str(options.make), "seed": options.seed}
    elif options.trainer:
        answer = train(options)
    elif options.generate:
        answer = time_parts(options.model, options.seed)
    else:
        answer = evaluate(load(options.evaluate), load(options.reference), MANY, options.seed)
    print(json.dumps({**answer, "threads": torch.get_num_threads(), "versions": versions()}))


if __name__ == "__main__":
    main()
