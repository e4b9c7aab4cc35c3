"""Prompt templates: chosen by the LLM's own chat template and carried by the tokenizer itself.

The reference applies a template only to models of certain names, cuts its end when a text is long, and counts the tokens to pool after
the fact. Here the template becomes the tokenizer's post-processor, so whoever calls the tokenizer gets it: truncation shortens the
content and never the template, and `token_type_ids` marks the tokens to pool.
"""

import copy
import json

import jinja2
from tokenizers import Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging


logger = logging.get_logger(__name__)

NO_TEMPLATE = "{text}"

# One user turn without a system prompt, as LLM2Vec (arXiv 2404.05961) and LLM2CLIP write it, and as the LLM's chat template does.
TEMPLATES = (
    "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",  # Llama 3
    "<|im_start|>user\n{text}<|im_end|>",  # ChatML: Qwen, SmolLM2
    "<start_of_turn>user\n{text}<end_of_turn>",  # Gemma
    "<|user|>\n{text}<|end|>",  # Phi-3
    "<|user|>{text}<|end|>",  # Phi-4-mini
    "[INST] {text} [/INST]",  # Llama 2, Mistral
    "[INST] {text}[/INST]",
    "[INST]{text}[/INST]",
)

_PREFIX = "proclip_"  # of the names that our post-processor gives its parts
_PROBE = "a"  # a content of one token


def choose_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The known template that the tokenizer's own chat template writes; none for an LLM without a chat template. ValueError if the chat template does not
    accept one message of a user.
    """
    if tokenizer.chat_template is None:
        return NO_TEMPLATE
    try:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": NO_TEMPLATE}], tokenize=False)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"The tokenizer's chat template refuses a single message ({error}): pass prompt_template."
        ) from error
    for template in TEMPLATES:
        if template in chat:
            return template
    logger.warning(
        f"No known prompt template fits the tokenizer's chat template, which makes {chat!r}. Texts are read without one: to have one, pass "
        "prompt_template with {text} in it."
    )
    return NO_TEMPLATE


def templated_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template: str, instruction: str | None, max_length: int
) -> PreTrainedTokenizerFast:
    """A copy of `tokenizer` that wraps every text in `template`, with `instruction` before the text; a template that it carries already is
    replaced. It pads on the left, with EOS if it has no padding token, and returns `token_type_ids`.

    The copy is of the generic class, which saves and loads all its parts as they are. Classes such as `Qwen2Tokenizer` rebuild theirs.

    Raises:
        ValueError: If the template does not hold `{text}` exactly once, or the tokenizer is not a fast one or has no token to pad with.
    """
    if template.count(NO_TEMPLATE) != 1:
        raise ValueError(f"prompt_template must hold {NO_TEMPLATE} exactly once, got {template!r}.")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: ProCLIP needs one that has a tokenizer.json "
            "(for a Mistral model: AutoTokenizer.from_pretrained(..., mistral_format=False))."
        )
    pad_token = tokenizer.pad_token or tokenizer.eos_token
    if pad_token is None:
        raise ValueError(f"{type(tokenizer).__name__} has neither pad_token nor eos_token: set tokenizer.pad_token.")
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False  # the template's markers are tokens, ...
    bos, eos = _remove_template(backend)
    before, after = template.split(NO_TEMPLATE)
    if instruction and instruction.strip():
        before += instruction.strip() + " "
    header, footer, separator = _tokenize_template(backend, before, after)
    if separator:
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(separator), *own])
    parts = {"bos": bos, "header": header, "footer": footer, "eos": eos}
    parts = {_PREFIX + name: ids for name, ids in parts.items() if ids}

    def piece(name: str, type_id: int) -> list[str]:
        return [f"{_PREFIX}{name}:{type_id}"] if _PREFIX + name in parts else []

    left, right = piece("bos", 0) + piece("header", 0), piece("footer", 1) + piece("eos", 1)
    backend.post_processor = processors.TemplateProcessing(
        single=[*left, "$A:1", *right],
        pair=[*left, "$A:1", "$B:1", *right],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": [backend.id_to_token(i) for i in ids]} for name, ids in parts.items()
        ],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{**tokenizer.special_tokens_map, "pad_token": pad_token},
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask", "token_type_ids"],
        model_max_length=max_length,
        padding_side="left",
        truncation_side="right",
        split_special_tokens=True,  # ... but a text that spells one is text
    )


def _remove_template(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """Undo what `templated_tokenizer` did, if it did; return what the tokenizer puts before and after a text by itself (BOS, EOS)."""
    if isinstance(backend.post_processor, processors.TemplateProcessing):
        parts = json.loads(backend.post_processor.__getstate__())["special_tokens"]
        if any(name.startswith(_PREFIX) for name in parts):
            steps = list(backend.normalizer) if isinstance(backend.normalizer, normalizers.Sequence) else []
            if steps and isinstance(steps[0], normalizers.Prepend) and steps[0].prepend == " ":
                backend.normalizer = steps[1] if len(steps) > 1 else None
            return tuple(parts.get(_PREFIX + name, {"ids": []})["ids"] for name in ("bos", "eos"))
    encoding = backend.encode(_PROBE)
    content = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    return encoding.ids[: content[0]], encoding.ids[content[-1] + 1 :]


def _tokenize_template(backend: Tokenizer, before: str, after: str) -> tuple[list[int], list[int], str]:
    """The tokens of `before` and `after`, and what has to be put before a content so that its tokens are those that it has in between: a space
    where a content's first token holds the space before it.
    """
    joint = backend.encode(before + _PROBE + after, add_special_tokens=False)
    end_of_content = len(before + _PROBE)
    last = next(i for i, (_, end) in enumerate(joint.offsets) if end >= end_of_content)
    for separator in ("", " "):
        content = backend.encode(separator + _PROBE, add_special_tokens=False).ids
        first = last + 1 - len(content)
        if first >= 0 and joint.ids[first : last + 1] == content:
            return joint.ids[:first], joint.ids[last + 1 :], separator
    # The tokens are other ones beside the template: as close as it gets is to tokenise its parts alone.
    header, footer = (backend.encode(part, add_special_tokens=False).ids for part in (before, after))
    return header, footer, ""
