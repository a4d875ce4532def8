"""TRL's DPO of a small GPT-2 on pairs from a file, and the accuracy of implicit rewards on held-out pairs.

Every line of a file of pairs is a record with `prompt`, `chosen` and `rejected`. The last line of the output is the
answer, as JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peer_trl import load, versions
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, TrainerCallback

SKIPPED = 8
AT_ONCE = 256


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Read records."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a checkpoint."""
    roles = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **roles)


class Watch(TrainerCallback):
    """Times the steps, by the clock and in seconds of the processor."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.work: list[float] = []
        self.last, self.used = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the watch."""
        self.last, self.used = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the time since the last step."""
        now, used = time.perf_counter(), time.process_time()
        self.steps.append(now - self.last)
        self.work.append(used - self.used)
        self.last, self.used = now, used


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train by TRL, and save the model."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    watch = Watch()
    with tempfile.TemporaryDirectory() as output:
        settings = DPOConfig(
            output_dir=output,
            seed=options.seed,
            use_cpu=True,
            bf16=False,
            learning_rate=options.rate,
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
            weight_decay=0.0,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            beta=options.beta,
            max_length=None,
            disable_dropout=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        began, used = time.perf_counter(), time.process_time()
        trainer = DPOTrainer(
            model=load(options.model),
            ref_model=load(options.model),
            args=settings,
            train_dataset=Dataset.from_list(read_pairs(options.pairs)),
            processing_class=tokenizer_of(options.model),
            callbacks=[watch],
        )
        ready, ready_used = time.perf_counter(), time.process_time()
        trainer.train()
        done, done_used = time.perf_counter(), time.process_time()
        trainer.model.save_pretrained(options.save)
    return {
        "step_seconds": statistics.median(watch.steps[SKIPPED:]),
        "step_cpu_seconds": statistics.median(watch.work[SKIPPED:]),
        "train_seconds": done - ready,
        "train_cpu_seconds": done_used - ready_used,
        "setup_seconds": ready - began,
        "setup_cpu_seconds": ready_used - used,
        "steps": len(watch.steps),
    }


@torch.no_grad()
def score(model: Any, tokenizer: Any, pairs: list[dict[str, str]], side: str) -> torch.Tensor:
    """Compute the log-probability of one side of each pair."""
    found = []
    for first in range(0, len(pairs), AT_ONCE):
        rows, masks = [], []
        for pair in pairs[first : first + AT_ONCE]:
            prompt = tokenizer(pair["prompt"])["input_ids"]
            answer = [*tokenizer(pair[side])["input_ids"], tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt + answer))
            masks.append(torch.tensor([0] * len(prompt) + [1] * len(answer)))
        tokens = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = pad_sequence(masks, batch_first=True)
        logits = model(tokens[:, :-1]).logits
        each = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])[..., 0]
        found.append((each * mask[:, 1:]).sum(-1))
    return torch.cat(found)


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Tell how often the implicit reward prefers what was chosen, and by how much, over β."""
    pairs, tokenizer = read_pairs(options.pairs), tokenizer_of(options.reference)
    models = [load(folder) for folder in (options.evaluate, options.reference)]
    ratios = []
    for side in ("chosen", "rejected"):
        ours, theirs = (score(model, tokenizer, pairs, side) for model in models)
        ratios.append(ours - theirs)
    margin = ratios[0] - ratios[1]
    loss = -torch.nn.functional.logsigmoid(options.beta * margin)
    return {
        "accuracy": (margin > 0).double().mean().item(),
        "margin": margin.mean().item(),
        "loss": loss.mean().item(),
        "pairs": len(pairs),
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the checkpoint to start from")
    parser.add_argument("--pairs", type=Path, required=True, help="file of records")
    parser.add_argument("--save", type=Path, help="where to write the trained model")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="evaluate a checkpoint instead")
    parser.add_argument("--reference", type=Path, help="the initial policy for --evaluate")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    answer = evaluate(options) if options.evaluate else train(options)
    print(json.dumps({**answer, "threads": torch.get_num_threads(), "versions": versions()}))


if __name__ == "__main__":
    main()
