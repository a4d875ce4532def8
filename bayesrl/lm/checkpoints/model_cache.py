"""`cached_model`: small models that are trained once and kept in the user's cache folder."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bayesrl.arguments import checked
from bayesrl.cache import cache_folder
from bayesrl.compilation.status import activity
from bayesrl.errors import LanguageModelError
from bayesrl.files.plain import file_name
from bayesrl.lm.checkpoints.pretrained import Pretrained, load_pretrained, save_pretrained


@checked(LanguageModelError)
def cached_model(name: str, made_of: Mapping[str, Any], train: Callable[[], Pretrained]) -> Pretrained:
    """Give a model that was trained before from the same things, or train it now and keep it.

    Args:
        name: of the model; part of the name of its folder, less what a name of a file cannot have.
        made_of: everything that the model depends on: options, and fingerprints of the data.
        train: trains it; called where it is not there yet.

    Example:
        >>> import jax
        >>> from bayesrl.lm import GPT2, GPT2Config, Pretrained, char_tokenizer
        >>> from bayesrl.lm.small_models import cached_model
        >>> tokenizer = char_tokenizer("ab")
        >>> config = GPT2Config(vocab_size=tokenizer.vocab_size, max_length=8, width=4, depth=1, heads=1)
        >>> make = lambda: Pretrained(GPT2.init(jax.random.key(0), config), tokenizer)
        >>> first, again = cached_model("tiny", {"seed": 0}, make), cached_model("tiny", {"seed": 0}, make)
        >>> first.folder == again.folder
        True
    """
    try:
        told = json.dumps([name, {"bayesrl": version("bayesrl"), **made_of}], sort_keys=True)
    except TypeError as error:
        raise LanguageModelError(f"what model {name!r} is made of cannot be written as JSON: {error}") from error
    folder = cache_folder() / f"{file_name(name)}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    if folder.is_dir() and not folder.is_symlink():
        try:
            return load_pretrained(folder)
        except LanguageModelError:
            shutil.rmtree(folder, ignore_errors=True)  # what was damaged is made anew
    with activity(f"training {name}, once on this machine"):
        trained = train()
    try:
        if folder.is_symlink() or not folder.is_dir():
            folder.unlink(missing_ok=True)  # a file or link of this name is none of ours
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "model"
            save_pretrained(made, trained.model, trained.tokenizer)
            if not folder.exists():
                made.rename(folder)
        return load_pretrained(folder)
    except (OSError, LanguageModelError):
        return trained  # a cache that cannot be written costs time, nothing else
