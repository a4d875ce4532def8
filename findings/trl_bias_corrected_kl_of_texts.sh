#!/bin/sh
# TRL 1.16.0: with `use_bias_correction_kl=True`, the default, GRPO's KL term is said to have the unbiased gradient of
# the reverse KL. It has by token, and not by text: each token pays for its own KL, and not for that of the tokens that
# it leads to. For texts of one token there is no difference.
#
# Seen: on a GPT-2 of 5 tokens with random weights, beside one with others, summed over all texts by their probability,
# the gradient of `_compute_loss` without advantages is that of KL(policy || reference) for texts of one token, and is
# not for texts of two; the KL of the second token, differentiated with the first token held, makes up the difference.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "transformers==5.24.0" "trl==1.16.0" \
    "datasets==5.2.0" "accelerate==1.15.0"
cat > "$folder/gradients.py" <<'PYTHON'
import itertools
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

WORDS = ["a", "b", "<bos>", "<eos>", "<pad>"]
BOS = 2


def make(seed, folder):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=1, n_head=1, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0, initializer_range=0.5, bos_token_id=2, eos_token_id=3, pad_token_id=4)
    GPT2LMHeadModel(config).save_pretrained(f"{folder}/{seed}")
    return GPT2LMHeadModel.from_pretrained(f"{folder}/{seed}", dtype=torch.float32).eval()


def log_probs(model, texts):
    seen = torch.cat([torch.full((len(texts), 1), BOS), texts], 1)
    scores = torch.log_softmax(model(seen).logits[:, :-1], -1)
    return scores.gather(-1, texts[..., None])[..., 0]


def gradient(loss, model):
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([part.ravel() for part in parts if part is not None])


def apart(length, folder):
    model, reference = make(0, folder), make(1, folder)
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    roles = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    words = PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **roles)
    settings = GRPOConfig(output_dir=folder, beta=1.0, loss_type="dr_grpo", max_completion_length=length, use_cpu=True,
                          bf16=False, num_generations=2, per_device_train_batch_size=2, report_to="none",
                          disable_dropout=True, gradient_checkpointing=False, temperature=1.0)
    assert settings.use_bias_correction_kl
    trainer = GRPOTrainer(model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=settings,
                          train_dataset=Dataset.from_dict({"prompt": ["<bos>"]}),
                          processing_class=words)
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    texts = torch.tensor(list(itertools.product(range(5), repeat=length)))
    with torch.no_grad():
        weights, told = log_probs(model, texts).sum(-1).exp(), log_probs(reference, texts)
    theirs = 0.0
    for text, weight, own in zip(texts, weights, told):
        ones = torch.ones(1, length, dtype=torch.long)
        inputs = {"prompt_ids": torch.full((1, 1), BOS), "prompt_mask": torch.ones(1, 1, dtype=torch.long),
                  "completion_ids": text[None], "completion_mask": ones, "advantages": torch.zeros(1),
                  "ref_per_token_logps": own[None]}
        theirs = theirs + weight * length * gradient(trainer._compute_loss(model, inputs), model)
    scores = log_probs(model, texts)
    ratio = scores - told
    chances = scores.sum(-1).exp()
    exact = gradient((chances * ratio.sum(-1)).sum(), model)
    by_token = gradient((chances.detach() * (scores * ratio.detach()).sum(-1)).sum(), model)
    return [((theirs - other).norm() / exact.norm()).item() for other in (exact, by_token)]


for length in (1, 2):
    from_text, from_token = apart(length, sys.argv[1])
    print(f"texts of {length}: off by {from_text:.4f} from the KL of texts, by {from_token:.4f} from that of tokens")
PYTHON
"$folder/venv/bin/python" "$folder/gradients.py" "$folder/out" 2>/dev/null | tee "$folder/told"
grep -q "texts of 1: off by 0.0000 from the KL of texts, by 0.0000" "$folder/told"
grep -q "texts of 2: off by 0.0000" "$folder/told" && exit 1
grep -q "texts of 2: off by .* by 0.0000 from that of tokens" "$folder/told"
