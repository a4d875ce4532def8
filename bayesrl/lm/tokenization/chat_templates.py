"""Render conversations as texts by chat templates, in Jinja's sandbox, as transformers does."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from bayesrl.display.formatting import pluralize
from bayesrl.errors import LanguageModelError
from bayesrl.lm.tokenization.tokenizer import Tokenizer
from bayesrl.lm.tokenization.tokenizer_files import token_text

MESSAGES = "messages"

SETTINGS = ("tools", "documents", "chat_template_kwargs")
"""Fields of records that templates read beside the messages."""

_MARK = "HERE-THE-ANSWER-GOES-ON "


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages: mappings with a role."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value)
    )


def render_prompt(record: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """Replace a record's conversation by its text under `prompt`; None for records without a conversation.

    Under `prompt`, the model continues a last message of the assistant. Under `messages`, such a message is the answer:
    it moves from the prompt to `answer`, unless the record already has one.
    """
    messages: Any = record.get("prompt")
    answer = None
    if not is_conversation(messages):
        if "prompt" in record or not is_conversation(record.get(MESSAGES)):
            return None
        messages = record[MESSAGES]
        if messages[-1]["role"] == "assistant" and len(messages) > 1:
            messages, answer = messages[:-1], messages[-1]
    if tokenizer is None:
        raise LanguageModelError("a prompt is a conversation, and the model has no tokenizer with a chat template")
    rendered = {**record, "prompt": render_conversation(tokenizer, messages, record), MESSAGES: list(messages)}
    if answer is not None and "answer" not in rendered:
        rendered["answer"] = [answer]
    return rendered


def render_answer(record: Mapping[str, Any], answer: Any, tokenizer: Tokenizer) -> str:
    """Return the text of an answer to a conversation, with whatever the template adds after it."""
    before = record["prompt"]
    whole = render_conversation(tokenizer, [*record[MESSAGES], *answer], record, answered=True)
    if not whole.startswith(before):
        raise LanguageModelError(
            f"the chat template writes a conversation otherwise once it is answered: {whole[:60]!r} does not begin "
            f"with {before[:60]!r}; pass prompt and answer as texts"
        )
    return whole[len(before) :]


def render_conversation(
    tokenizer: Tokenizer, messages: Sequence[Any], record: Mapping[str, Any] | None = None, *, answered: bool = False
) -> str:
    """Return the text of a conversation, up to where the assistant writes.

    The model continues a last message of the assistant, unless it is the answer.
    """
    record = record or {}
    template = _select_template(tokenizer.config.get("chat_template"), bool(record.get("tools")))
    names = [*tokenizer.special_map.items(), *tokenizer.config.items()]
    tokens = {
        key: token_text(value) for key, value in names if key.endswith("_token") and token_text(value) is not None
    }
    tokens |= {f"{name}_token": tokenizer.core.id_to_token(index) for name, index in tokenizer.special.items()}
    # Templates that only test whether a key exists would write its missing value as "None".
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    continues = messages[-1]["role"] == "assistant" and not answered
    if continues:
        messages[-1] = _mark_end(messages[-1])
    context = {
        **tokens,
        # Before the messages, so that these cannot be replaced.
        **(record.get("chat_template_kwargs") or {}),
        "messages": messages,
        "tools": record.get("tools"),
        "documents": record.get("documents"),
        "add_generation_prompt": not answered and not continues,
    }
    try:
        text: str = _compile_template(template).render(**context)
    except LanguageModelError:
        raise
    except Exception as error:  # whatever a template does
        raise LanguageModelError(
            f"the chat template cannot write a conversation of {pluralize(len(messages), 'message')}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not continues:
        return text
    place = text.rfind(_MARK.strip())
    if place < 0:
        raise LanguageModelError("the chat template leaves the last message out, so that nothing can go on with it")
    # If the blank at the end of the mark is gone, the template strips messages, so strip this one too.
    return text[:place] if text[place:].startswith(_MARK) else text[:place].rstrip()


def _mark_end(message: Mapping[str, Any]) -> dict[str, Any]:
    """Mark the end of a message's content, to find it again in the text of the conversation."""
    content = message.get("content", "")
    if isinstance(content, str):
        return {**message, "content": content + _MARK}
    blocks = (
        [dict(block) if isinstance(block, Mapping) else block for block in content] if isinstance(content, list) else []
    )
    last = next((block for block in reversed(blocks) if isinstance(block, dict) and "text" in block), None)
    if last is None:
        raise LanguageModelError(f"the last message says {content!r:.60}, which is not a text that could be continued")
    last["text"] = f"{last['text']}{_MARK}"
    return {**message, "content": blocks}


def _select_template(template: Any, tools: bool) -> str:
    """Choose among the templates of a tokenizer."""
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, Mapping)}
        template = named.get("tool_use" if tools and "tool_use" in named else "default")
    if not isinstance(template, str):
        raise LanguageModelError(
            "a prompt is a conversation, and the tokenizer has no chat template; pass texts, or a tokenizer whose "
            "folder has chat_template.jinja"
        )
    return template


@lru_cache(maxsize=16)
def _compile_template(template: str) -> Any:
    """Compile a template in a sandbox, where it can change nothing and reach only its inputs."""
    try:
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise LanguageModelError(
            "chat templates need a library that is not installed; install bayesrl with its extra: pip install "
            "'bayesrl[lm]'"
        ) from error

    class Generation(Extension):
        """Ignores the marks that some templates put around the assistant's text, for training, and writes the text."""

        tags = {"generation"}  # noqa: RUF012  (Jinja's own form)

        def parse(self, parser: Any) -> Any:
            """Read the marked part."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise LanguageModelError(f"the chat template refuses the conversation: {message}")

    def as_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    space = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    # Jinja's own filter escapes <, > and & for HTML.
    space.filters["tojson"] = as_json
    space.globals["raise_exception"] = refuse
    space.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return space.from_string(template)
    except TemplateSyntaxError as error:
        raise LanguageModelError(
            f"the chat template cannot be read: {error.message} in line {error.lineno}; copy it anew"
        ) from error
