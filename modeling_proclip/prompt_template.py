"""Prompt templates: chosen by the LLM's own chat markers and carried by the tokenizer itself.

The reference applies a template only to models of certain names, cuts its end when a text is long, and counts the tokens to pool after
the fact. Here the template becomes the tokenizer's post-processor, so whoever calls the tokenizer gets it: truncation shortens the
content and never the template, and `token_type_ids` marks the tokens to pool.
"""

import json

from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerBase


# Chat marker -> template of one user turn, without a system prompt (LLM2Vec, arXiv 2404.05961, and LLM2CLIP use these).
TEMPLATES = {
    "<|start_header_id|>": "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",  # Llama 3
    "<|im_start|>": "<|im_start|>user\n{text}<|im_end|>",  # Qwen, SmolLM2: ChatML
    "<start_of_turn>": "<start_of_turn>user\n{text}<end_of_turn>",  # Gemma
    "<|user|>": "<|user|>\n{text}<|end|>",  # Phi-3
    "[INST]": "[INST] {text} [/INST]",  # Mistral, Llama 2
}
NO_TEMPLATE = "{text}"

_PREFIX = "proclip_"  # of the names that our post-processor gives its parts
_SEPARATOR = " "  # between instruction and text


def choose_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of the first marker that the tokenizer's chat template uses; none for an LLM without a chat template."""
    chat_template = tokenizer.chat_template
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default", "")
    for marker, template in TEMPLATES.items():
        if marker in (chat_template or ""):
            return template
    return NO_TEMPLATE


def apply_template(tokenizer: PreTrainedTokenizerBase, template: str, instruction: str | None) -> int:
    """
    Make `tokenizer` wrap every text in `template`, with `instruction` before the text; replaces a template applied before.

    Returns:
        `int`: The number of tokens that the template and the tokenizer's own special tokens add to every text.

    Raises:
        ValueError: If the template does not hold `{text}` exactly once, or the tokenizer is not a fast one or has no token to pad with.
    """
    if template.count(NO_TEMPLATE) != 1:
        raise ValueError(f"prompt_template must hold {NO_TEMPLATE} exactly once, got {template!r}.")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer: ProCLIP needs a tokenizer.json (a fast tokenizer)."
        )
    bos, eos = _own_special_tokens(tokenizer)
    before, after = template.split(NO_TEMPLATE)
    if instruction:
        before += instruction.strip()
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = False  # the template's markers are tokens, ...
    header, footer = (backend.encode(part, add_special_tokens=False).ids for part in (before, after))
    tokenizer.split_special_tokens = True  # ... but a text that spells one is text
    tokenizer.init_kwargs["split_special_tokens"] = True
    parts = {"bos": bos, "header": header, "footer": footer, "eos": eos}
    parts = {_PREFIX + name: ids for name, ids in parts.items() if ids}

    def piece(name: str, type_id: int) -> list[str]:
        return [f"{_PREFIX}{name}:{type_id}"] if _PREFIX + name in parts else []

    left, right = piece("bos", 0) + piece("header", 0), piece("footer", 1) + piece("eos", 1)
    backend.post_processor = processors.TemplateProcessing(
        single=[*left, "$A:1", *right],
        pair=[*left, "$A:1", "$B:1", *right],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)} for name, ids in parts.items()
        ],
    )
    _set_separator(tokenizer, needed=bool(instruction))
    return sum(map(len, parts.values()))


def _own_special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text by itself, also if it carries a template of ours by now."""
    post_processor = tokenizer.backend_tokenizer.post_processor
    if isinstance(post_processor, processors.TemplateProcessing):
        parts = json.loads(post_processor.__getstate__())["special_tokens"]
        if any(name.startswith(_PREFIX) for name in parts):
            return tuple(parts.get(_PREFIX + name, {"ids": []})["ids"] for name in ("bos", "eos"))
    encoding = tokenizer.backend_tokenizer.encode("a")
    content = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    return encoding.ids[: content[0]], encoding.ids[content[-1] + 1 :]


def _set_separator(tokenizer: PreTrainedTokenizerBase, needed: bool) -> None:
    """Put a space before the content, so that instruction and text are tokenised as if they were one string."""
    backend = tokenizer.backend_tokenizer
    steps = list(backend.normalizer) if isinstance(backend.normalizer, normalizers.Sequence) else [backend.normalizer]
    steps = [step for step in steps if step is not None]
    if steps and isinstance(steps[0], normalizers.Prepend) and steps[0].prepend == _SEPARATOR:
        steps = steps[1:]
    if needed:
        steps.insert(0, normalizers.Prepend(_SEPARATOR))
    backend.normalizer = normalizers.Sequence(steps) if len(steps) > 1 else (steps[0] if steps else None)
