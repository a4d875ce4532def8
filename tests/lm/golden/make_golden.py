"""Make the tiny checkpoints that the tests read, or check what bayesrl saved, with transformers as the reference.

Needs an environment of its own (Python 3.11, torch==2.13.0, transformers==5.24.0, peft==0.21.2), which the tests do not:

    python make_golden.py [NAME ...]          writes a folder per family beside this file, or those that are named
    python make_golden.py --check-adapter BASE FOLDER
                                              loads an adapter that bayesrl.lm.save_adapter wrote, in the same way
    python make_golden.py --check FOLDER ...  loads folders that bayesrl.lm.save_pretrained wrote; each of them must
                                              have an expected.npz beside its model.safetensors to be compared with
"""

import json
import sys
from pathlib import Path
from typing import Any

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
TINY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LEAN = {**TINY, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 64}
NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
}
LOCAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
SLIDING, FULL = "sliding_attention", "full_attention"
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")


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
    return spread(made)


def spread(made: dict[str, tr.PreTrainedModel]) -> dict[str, tr.PreTrainedModel]:
    """Move every array away from where it begins."""
    for model in made.values():
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.08 * torch.randn_like(parameter))
    return made


def relatives() -> dict[str, tr.PreTrainedModel]:
    """Make one small model for each further family, and for each way of turning positions and of seeing."""
    torch.manual_seed(1)
    gemma = {**LEAN, **NO_IDS, "head_dim": 8, "initializer_range": 0.2}
    encoder = {**TINY, "intermediate_size": 24, "max_position_embeddings": 32, "num_labels": 3}
    distil = {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "num_labels": 3}
    modern = {
        **{key: value for key, value in encoder.items() if key != "num_hidden_layers"}, "num_hidden_layers": 3,
        "local_attention": 4, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "cls_token_id": None,
        "sep_token_id": None,
    }  # fmt: skip
    gemma2 = {**gemma, "sliding_window": 4, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0}
    gemma3 = {
        **gemma, "sliding_window": 4, "layer_types": [SLIDING, FULL], "query_pre_attn_scalar": 12,
        "rope_parameters": LOCAL,
    }  # fmt: skip
    smol = {**LEAN, **NO_IDS, "num_hidden_layers": 4, "sliding_window": 3, "use_sliding_window": True}
    neox = {key: value for key, value in LEAN.items() if key != "num_key_value_heads"}
    half = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    qwen = {**LEAN, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    rope = {"llama_yarn": YARN, "llama_dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}}
    phi = {**LEAN, **NO_IDS}
    made = {
        "gemma": tr.GemmaForCausalLM(tr.GemmaConfig(**gemma)),
        "gemma2": tr.Gemma2ForCausalLM(tr.Gemma2Config(**gemma2, final_logit_softcapping=3.0)),
        "gemma3": tr.Gemma3ForCausalLM(tr.Gemma3TextConfig(**gemma3)),
        "phi3": tr.Phi3ForCausalLM(tr.Phi3Config(**phi, sliding_window=4)),
        "phi3_long": tr.Phi3ForCausalLM(
            tr.Phi3Config(**phi, original_max_position_embeddings=32, rope_parameters=LONG)
        ),
        "olmo2": tr.Olmo2ForCausalLM(tr.Olmo2Config(**LEAN, **NO_IDS)),
        "smollm3": tr.SmolLM3ForCausalLM(tr.SmolLM3Config(**smol)),
        "neox": tr.GPTNeoXForCausalLM(tr.GPTNeoXConfig(**neox, rope_parameters=half)),
        "neox_serial": tr.GPTNeoXForCausalLM(
            tr.GPTNeoXConfig(**neox, use_parallel_residual=False, rope_parameters=half)
        ),
        "mistral_window": tr.MistralForCausalLM(tr.MistralConfig(**LEAN, sliding_window=4)),
        "qwen2_window": tr.Qwen2ForCausalLM(tr.Qwen2Config(**qwen)),
        "mixtral": tr.MixtralForCausalLM(tr.MixtralConfig(**LEAN, num_local_experts=4)),
        **{name: tr.LlamaForCausalLM(tr.LlamaConfig(**LEAN, rope_parameters=told)) for name, told in rope.items()},
        "roberta": tr.RobertaForSequenceClassification(tr.RobertaConfig(**encoder, type_vocab_size=1)),
        "distilbert": tr.DistilBertForSequenceClassification(tr.DistilBertConfig(**distil, max_position_embeddings=32)),
        "modernbert": tr.ModernBertForSequenceClassification(tr.ModernBertConfig(**modern)),
        "modernbert_mean": tr.ModernBertForSequenceClassification(
            tr.ModernBertConfig(**modern, classifier_pooling="mean", classifier_activation="relu")
        ),
    }
    return spread(made)


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
    causal = model.config.model_type not in ENCODERS
    tokens, mask = prompts(left=causal)
    # RoBERTa tells padding by its token.
    tokens = np.where(mask, tokens, model.config.pad_token_id or 0)
    fed = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
    if not causal:
        return {"tokens": tokens, "real": mask, "logits": model(**fed).logits.float().numpy()}
    positions = (fed["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**fed, position_ids=positions).logits.float().numpy()
    settings = tr.GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=None)
    model.generation_config = settings
    generated = model.generate(**fed)[:, tokens.shape[1] :].numpy()
    other = otherwise(model)(**fed, position_ids=positions).logits.float().numpy()
    return {"tokens": tokens, "real": mask, "logits": logits, "greedy": generated, "other": other}


def otherwise(model: tr.PreTrainedModel) -> tr.PreTrainedModel:
    """Tie the head where it is not tied, or give it a table of its own, the rows turned round."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    head.weight = torch.nn.Parameter(table.flip(0)) if head.weight is table else table
    return model


def tokenizer() -> tr.PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer of 64 tokens."""
    import tokenizers as tk

    core = tk.Tokenizer(tk.models.BPE(unk_token="<unk>"))  # noqa: S106
    core.pre_tokenizer = tk.pre_tokenizers.Whitespace()
    trainer = tk.trainers.BpeTrainer(vocab_size=64, special_tokens=["<pad>", "<eos>", "<unk>"], show_progress=False)
    core.train_from_iterator(["the cat sat on the mat", "a dog ran to the cat and sat", "quick brown foxes"], trainer)
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return tr.PreTrainedTokenizerFast(tokenizer_object=core, **special)


def make(names: list[str]) -> None:
    """Write all folders, or some."""
    facts()
    adapters()
    for name, model in {**models(), **relatives()}.items():
        if names and name not in names:
            continue
        folder = HERE / name
        model.save_pretrained(folder, max_shard_size="40KB" if name == "qwen2" else "5GB")
        np.savez_compressed(folder / "expected.npz", **expected(model))
        if name == "gpt2":
            tokenizer().save_pretrained(folder)
        print(name, sum(path.stat().st_size for path in folder.iterdir()) // 1000, "kB")


def adapters() -> None:
    """Write adapters beside some of the models, drawn at random, and what PEFT makes of the prompts with them."""
    import peft

    torch.manual_seed(2)
    patterns = {"rank_pattern": {"attn.c_proj": 3, "h.1.mlp.c_fc": 1}, "alpha_pattern": {"c_attn": 5, "mlp.c_proj": 1}}
    wide = ["q_proj", "v_proj", "down_proj"]
    asked = {
        "gpt2_lora": ("gpt2", {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"], **patterns}),
        "llama_lora": (
            "llama_dynamic",
            {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": wide, "modules_to_save": ["lm_head"]},
        ),
        "neox_lora": ("neox", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "bias": "all"}),
        "phi3_lora": ("phi3", {"r": 2, "lora_alpha": 8, "target_modules": r".*layers\.1\..*(qkv|gate_up)_proj"}),
        "bert_lora": ("roberta", {"r": 2, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    }
    for name, (base, settings) in asked.items():
        encoder = settings.get("task_type") == "SEQ_CLS"
        kind = tr.AutoModelForSequenceClassification if encoder else tr.AutoModelForCausalLM
        if not encoder:
            settings["task_type"] = "CAUSAL_LM"
        model = peft.get_peft_model(kind.from_pretrained(HERE / base), peft.LoraConfig(**settings))
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.peft_config["default"].base_model_name_or_path = base
        tokens, mask = prompts(left=not encoder)
        tokens = np.where(mask, tokens, model.config.pad_token_id or 0)
        fed = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
        if not encoder:
            fed["position_ids"] = (fed["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**fed).logits.float().numpy()
        model.save_pretrained(HERE / name)
        (HERE / name / "README.md").unlink(missing_ok=True)
        np.savez_compressed(HERE / name / "expected.npz", tokens=tokens, real=mask, logits=logits)


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRICT = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {%- generation %}
        {{- ' ' + message['content'] | trim + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}"""
TOOLS = """{% if tools %}
    {%- for tool in tools %}
{{ tool | tojson(indent=2) }}
    {%- endfor %}
{% endif %}
{% for message in messages if message.role != 'skip' %}
    {%- if message.content is none %}{% continue %}{% endif %}
<{{ message.role }}>{{ message.content }}{% if mood is defined %} ({{ mood }}){% endif %}

{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def chats() -> list[dict[str, Any]]:
    """Say what transformers writes for conversations."""
    text = tokenizer()
    text.bos_token = "<unk>"  # noqa: S105
    hello, reply = {"role": "user", "content": " Grüß Gott "}, {"role": "assistant", "content": "Servus, <b>you</b>"}
    tool = {"type": "function", "function": {"name": "zählen", "parameters": {"n": "<int>"}}}
    system = {"role": "system", "content": "kurz"}
    told = [
        {"template": CHATML, "prompt": [system, hello]},
        {"template": CHATML, "prompt": [hello, reply]},
        {"template": CHATML, "messages": [hello, reply, hello, reply]},
        {"template": STRICT, "prompt": [hello]},
        {"template": STRICT, "messages": [hello, reply]},
        {"template": TOOLS, "prompt": [system, hello], "tools": [tool]},
        {"template": TOOLS, "messages": [hello, {"role": "skip", "content": "x"}, hello], "tools": [tool]},
        {"template": TOOLS, "prompt": [hello], "chat_template_kwargs": {"mood": "heiter"}},
    ]
    for one in told:
        talk = one.get("prompt") or one["messages"]
        common = {
            "chat_template": one["template"], "tools": one.get("tools"), "tokenize": False,
            **one.get("chat_template_kwargs", {}),
        }  # fmt: skip
        answered = talk[-1]["role"] == "assistant"
        if answered and "messages" in one:
            one["whole"] = text.apply_chat_template(talk, **common)
            talk, answered = talk[:-1], False
        one["text"] = text.apply_chat_template(
            talk, add_generation_prompt=not answered, continue_final_message=answered, **common
        )
    return told


def facts() -> None:
    """Write what transformers takes for settings that are left out, and the values of its activations."""
    names = (
        "gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2",
        "smollm3", "gpt_neox", "bert", "roberta", "xlm-roberta", "distilbert", "modernbert",
    )  # fmt: skip
    told = {name: tr.AutoConfig.for_model(name).to_dict() for name in names}
    plain = tr.PreTrainedConfig().to_dict()
    told = {
        name: {key: value for key, value in own.items() if key not in plain or key in ("id2label", "pad_token_id")}
        for name, own in told.items()
    }
    (HERE / "defaults.json").write_text(json.dumps(told, sort_keys=True) + "\n")
    (HERE / "chats.json").write_text(json.dumps(chats(), indent=1, ensure_ascii=False) + "\n")
    at = torch.tensor([-20.0, -6.5, -2.0, -1.0, -0.3, 0.0, 0.2, 0.9, 2.5, 7.0, 30.0])
    functions = {name: tr.activations.ACT2FN[name] for name in tr.activations.ACT2CLS if name not in ("prelu", "xielu")}
    np.savez(HERE / "activations.npz", at=at.numpy(), **{name: fn(at).numpy() for name, fn in functions.items()})


def check(folders: list[str]) -> None:
    """Compare what transformers makes of saved folders with what it made of the originals."""
    for folder in folders:
        kind = tr.AutoConfig.from_pretrained(folder)
        auto = tr.AutoModelForSequenceClassification if kind.model_type in ENCODERS else tr.AutoModelForCausalLM
        model, report = auto.from_pretrained(folder, output_loading_info=True)
        model.eval()
        arrays, wanted = expected(model), np.load(Path(folder) / "expected.npz")
        gaps = {name: float(np.abs(arrays[name] - wanted[name]).max()) for name in wanted if name in arrays}
        words = ""
        if (Path(folder) / "tokenizer.json").exists():
            text = tr.AutoTokenizer.from_pretrained(folder)
            words = f"tokenizer eos={text.eos_token_id} pad={text.pad_token_id} {text('the cat')['input_ids']}"
        bad = {name: found for name, found in report.items() if found}
        print(Path(folder).name, type(model).__name__, model.dtype, "largest gaps", gaps, "not loaded", bad, words)


def check_adapter(base: str, folder: str) -> None:
    """Compare what PEFT makes of a saved adapter with what bayesrl said that its logits are."""
    import peft

    model = peft.PeftModel.from_pretrained(tr.AutoModelForCausalLM.from_pretrained(base), folder).eval()
    wanted = np.load(Path(folder) / "expected.npz")
    mask = torch.tensor(wanted["real"])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(torch.tensor(wanted["tokens"]), attention_mask=mask, position_ids=places).logits.numpy()
    there = wanted["real"].astype(bool)
    print(Path(folder).name, "largest gap", float(np.abs(logits - wanted["logits"])[there].max()))


if __name__ == "__main__":
    commands = {"--check": lambda: check(sys.argv[2:]), "--check-adapter": lambda: check_adapter(*sys.argv[2:])}
    commands.get(sys.argv[1] if sys.argv[1:] else "", lambda: make(sys.argv[1:]))()
