"""Make the tiny checkpoints that the tests read, or check what bayesrl saved, with transformers as the reference.

Needs an environment of its own (Python 3.11, torch==2.13.0, transformers==5.24.0), which the tests do not:

    python make_golden.py                     writes a folder per family beside this file
    python make_golden.py --check FOLDER ...  loads folders that bayesrl.lm.save_pretrained wrote; each of them must
                                              have an expected.npz beside its model.safetensors to be compared with
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers as tr

HERE = Path(__file__).parent
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
# Short wavelengths, that the context of 16 falls between the bounds of the stretch.
STRETCH = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LENGTHS = (5, 9, 3)
NEW = 12


def models() -> dict[str, tr.PreTrainedModel]:
    """Make one model per family; the seed is fixed, and no array is left at 0 or 1."""
    torch.manual_seed(0)
    gpt2 = tr.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    made = {
        "gpt2": tr.GPT2LMHeadModel(gpt2),
        "llama": tr.LlamaForCausalLM(tr.LlamaConfig(**GATED, rope_parameters=STRETCH, tie_word_embeddings=False)),
        "smollm": tr.LlamaForCausalLM(tr.LlamaConfig(**GATED, attention_bias=True, tie_word_embeddings=True)),
        "mistral": tr.MistralForCausalLM(tr.MistralConfig(**GATED, sliding_window=None, tie_word_embeddings=False)),
        "qwen2": tr.Qwen2ForCausalLM(tr.Qwen2Config(**GATED, tie_word_embeddings=True)),
        "qwen3": tr.Qwen3ForCausalLM(tr.Qwen3Config(**GATED, head_dim=12, tie_word_embeddings=False)),
        "bert": tr.BertForSequenceClassification(
            tr.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=32, num_labels=3)
        ),
    }
    for model in made.values():
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.08 * torch.randn_like(parameter))
    return made


def prompts(*, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Give token ids and mask of a batch of unequal lengths, padded with 0."""
    generator = np.random.default_rng(1)
    tokens, mask = np.zeros((len(LENGTHS), max(LENGTHS)), np.int64), np.zeros((len(LENGTHS), max(LENGTHS)), np.int64)
    for row, n in enumerate(LENGTHS):
        where = slice(max(LENGTHS) - n, None) if left else slice(0, n)
        tokens[row, where], mask[row, where] = generator.integers(2, 64, n), 1
    return tokens, mask


@torch.no_grad()
def expected(model: tr.PreTrainedModel) -> dict[str, np.ndarray]:
    """Say what a model makes of the prompts."""
    causal = model.config.model_type != "bert"
    tokens, mask = prompts(left=causal)
    fed = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
    if not causal:
        return {"tokens": tokens, "real": mask, "logits": model(**fed).logits.float().numpy()}
    positions = (fed["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**fed, position_ids=positions).logits.float().numpy()
    settings = tr.GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=None)
    model.generation_config = settings
    generated = model.generate(**fed)[:, tokens.shape[1] :].numpy()
    return {"tokens": tokens, "real": mask, "logits": logits, "greedy": generated}


def tokenizer() -> tr.PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer of 64 tokens."""
    import tokenizers as tk

    core = tk.Tokenizer(tk.models.BPE(unk_token="<unk>"))  # noqa: S106
    core.pre_tokenizer = tk.pre_tokenizers.Whitespace()
    trainer = tk.trainers.BpeTrainer(vocab_size=64, special_tokens=["<pad>", "<eos>", "<unk>"], show_progress=False)
    core.train_from_iterator(["the cat sat on the mat", "a dog ran to the cat and sat", "quick brown foxes"], trainer)
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return tr.PreTrainedTokenizerFast(tokenizer_object=core, **special)


def make() -> None:
    """Write all folders."""
    for name, model in models().items():
        folder = HERE / name
        arrays = expected(model)
        model.save_pretrained(folder, max_shard_size="40KB" if name == "qwen2" else "5GB")
        np.savez_compressed(folder / "expected.npz", **arrays)
        if name == "gpt2":
            tokenizer().save_pretrained(folder)
        print(name, sum(path.stat().st_size for path in folder.iterdir()) // 1000, "kB")


def check(folders: list[str]) -> None:
    """Compare what transformers makes of saved folders with what it made of the originals."""
    for folder in folders:
        kind = tr.AutoConfig.from_pretrained(folder)
        auto = tr.AutoModelForSequenceClassification if kind.model_type == "bert" else tr.AutoModelForCausalLM
        model, report = auto.from_pretrained(folder, output_loading_info=True)
        model.eval()
        arrays, wanted = expected(model), np.load(Path(folder) / "expected.npz")
        gaps = {name: float(np.abs(arrays[name] - wanted[name]).max()) for name in arrays}
        words = ""
        if (Path(folder) / "tokenizer.json").exists():
            text = tr.AutoTokenizer.from_pretrained(folder)
            words = f"tokenizer eos={text.eos_token_id} pad={text.pad_token_id} {text('the cat')['input_ids']}"
        bad = {name: found for name, found in report.items() if found}
        print(Path(folder).name, type(model).__name__, model.dtype, "largest gaps", gaps, "not loaded", bad, words)


if __name__ == "__main__":
    check(sys.argv[2:]) if sys.argv[1:2] == ["--check"] else make()
