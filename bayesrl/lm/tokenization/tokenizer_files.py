"""The files of a tokenizer: their names, and how to read them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bayesrl.errors import LanguageModelError, RunFolderError
from bayesrl.files import schemas
from bayesrl.files.regular_files import read_file
from bayesrl.value_checks import is_count

TOKENIZER, TOKENIZER_CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATE, OLD_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
GENERATION, CONFIG = "generation_config.json", "config.json"
CHECKPOINT_FILES = (
    *(CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, SPECIAL, ADDED, TEMPLATE, OLD_TEMPLATE),
    f"{MORE_TEMPLATES}/*.jinja",
)
"""What a checkpoint has beside its weights."""


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object, or return None if the file does not exist."""
    content = read_content(path, schemas.MOST_BYTES)
    if content is None:
        return None
    try:
        value = schemas.parsed(content)
    except ValueError as error:
        raise LanguageModelError(f"cannot read {path}: {error}; it is damaged: copy it anew") from error
    if not isinstance(value, dict):
        raise LanguageModelError(f"{path} holds a {type(value).__name__}, not an object; it is damaged: copy it anew")
    return value


def read_content(path: Path, most: int | None = None) -> bytes | None:
    """Read a regular file, or return None if it does not exist; links may stand for files in checkpoint folders."""
    try:
        return read_file(path, most=most, linked=True)
    except RunFolderError as error:
        raise LanguageModelError(str(error)) from error


def read_chat_template(path: Path, configured: Any) -> Any:
    """Read the chat template of a folder: a text, or a list of several by name; None without one.

    A template in its own file takes precedence over one in tokenizer_config.json.
    """
    files: dict[str, Path] = {one.stem: one for one in sorted((path / MORE_TEMPLATES).glob("*.jinja"))}
    if (path / TEMPLATE).is_file():
        files = {"default": path / TEMPLATE, **files}
    try:
        templates = {name: (read_content(file) or b"").decode() for name, file in files.items()}
    except ValueError as error:
        raise LanguageModelError(
            f"cannot read a chat template of {path}: {error}; it is damaged: copy it anew"
        ) from error
    if "default" not in templates:
        old = read_json_object(path / OLD_TEMPLATE) or {} if configured is None else {}
        default = old.get("chat_template", configured)
        if not templates or isinstance(default, list):
            return default
        templates |= {"default": default} if isinstance(default, str) else {}
    if list(templates) == ["default"]:
        return templates["default"]
    return [{"name": name, "template": template} for name, template in templates.items()]


def add_tokens(core: Any, config: Mapping[str, Any], path: Path) -> Any:
    """Add the tokens that tokenizer_config.json has beyond those of tokenizer.json, as transformers does.

    Folders of earlier versions list them in added_tokens.json instead.
    """
    listed, file = config.get("added_tokens_decoder"), path / TOKENIZER_CONFIG
    if listed is None:
        file = path / ADDED
        listed = {str(index): {"content": content} for content, index in (read_json_object(file) or {}).items()}
    if not (
        isinstance(listed, dict)
        and all(isinstance(token, dict) and isinstance(token.get("content"), str) for token in listed.values())
        and all(str(index).isdecimal() for index in listed)
    ):
        raise LanguageModelError(f"{file} has no list of added tokens; it is damaged: copy it anew")
    # In order, because the library gives each added token the next id.
    numbered = sorted((int(index), token) for index, token in listed.items())
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    for index, token in numbered:
        content = token["content"]
        if core.token_to_id(content) is not None:
            continue
        token_made = import_tokenizers().AddedToken(
            content, **{name: bool(token[name]) for name in flags if name in token}
        )
        (core.add_special_tokens if token.get("special") else core.add_tokens)([token_made])
        if core.token_to_id(content) != index:
            raise LanguageModelError(
                f"{file} adds token {content!r} as id {index}, which after those of {TOKENIZER} "
                f"would be {core.token_to_id(content)}; copy both files anew from the model that they belong to"
            )
    return core


def check_special_tokens(core: Any, named: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuse named special tokens that the tokenizer does not have."""
    for settings, file in zip(named, (TOKENIZER_CONFIG, SPECIAL), strict=True):
        tokens = [(f"{name}_token", settings.get(f"{name}_token")) for name in ("eos", "pad", "bos")]
        for name in ("additional_special_tokens", "extra_special_tokens"):
            more = settings.get(name)
            listed = list(more.values()) if isinstance(more, Mapping) else more if isinstance(more, list) else []
            tokens += [(f"one of {name}", one) for one in listed]
        for name, token in tokens:
            text = token_text(token)
            if isinstance(text, str) and core.token_to_id(text) is None:
                raise LanguageModelError(
                    f"{path / file} names {text!r} as {name}, and {TOKENIZER} has no such token; add it to the "
                    "tokenizer in transformers and save it anew, or take the name out"
                )


def find_special_id(
    core: Any, name: str, named: Sequence[Mapping[str, Any]], numbered: Sequence[Mapping[str, Any]]
) -> int | None:
    """Find the id of a special token: first by its name, as the tokenizer itself does."""
    for settings in named:
        token = token_text(settings.get(f"{name}_token"))
        index = core.token_to_id(token) if isinstance(token, str) else None
        if index is not None:
            return index
    for settings in numbered:
        index = settings.get(f"{name}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and has_token(core, index):
            return index
    return None


def read_eos_ids(numbered: Sequence[Mapping[str, Any]], path: Path) -> list[int] | None:
    """Return the ids that end a text, from generation_config.json or else from config.json."""
    for settings, file in zip(numbered, (GENERATION, CONFIG), strict=True):
        index = settings.get("eos_token_id")
        if index is None:
            continue
        listed = index if isinstance(index, list) else [index]
        # Not by isinstance: True is an int too.
        if not all(type(token_id) is int for token_id in listed):
            raise LanguageModelError(
                f"{path / file} sets eos_token_id={index!r}; set the id of a token there, or a list of them"
            )
        return listed
    return None


def token_text(token: Any) -> Any:
    """Return the text of a token in a file, where it is a text or a mapping that also says how to cut it out."""
    return token.get("content") if isinstance(token, Mapping) else token


def without_prefix_space(part: Any) -> Any:
    """Return a normalizer or pre-tokenizer of tokenizer.json without the blank that it puts before a text."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    if kind == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**part, "add_prefix_space": False}
    lists = ("normalizers", "pretokenizers")
    return {key: [without_prefix_space(one) for one in own] if key in lists else own for key, own in part.items()}


def has_token(core: Any, index: Any) -> bool:
    """Whether a tokenizer has an id; some configurations use −1 for none."""
    return is_count(index, least=0) and index < 2**31 and core.id_to_token(int(index)) is not None


def import_tokenizers() -> Any:
    """Import the `tokenizers` library."""
    try:
        import tokenizers
    except ImportError as error:
        raise LanguageModelError(
            "tokenizers need a library that is not installed; install bayesrl with its extra: pip install 'bayesrl[lm]'"
        ) from error
    return tokenizers
