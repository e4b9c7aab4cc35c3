"""The template in the tokenizer: chosen by the chat template, tokenised as in the whole string, kept by every tokenizer class."""

import copy
import json
import pickle

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from modeling_proclip import ProCLIPProcessor
from modeling_proclip.prompt_template import NO_TEMPLATE, TEMPLATES, choose_template, templated_tokenizer
from tests.modeling_proclip import tiny


CORPUS = [
    "a red fox user assistant model",
    "[INST] one two three [/INST]",
    "Given a sentence , retrieve : naïve café",
] * 9
CHATML = "<|im_start|>user\n{text}<|im_end|>"
INSTRUCTION = "Given a sentence, retrieve:"
TEXTS = ["a red fox", "one", "naïve 狐狸 🦊", "Given\nfive", "שלום عالم"]


def trained(pre_tokenizer, unk_token: str | None, special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a small BPE whose tokens do not cross words."""
    backend = Tokenizer(models.BPE(unk_token=unk_token))
    backend.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel) else []
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*special, *byte_tokens], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    model = json.loads(backend.model.__getstate__())
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def byte_level(special: list[str]):
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), None, special)


def metaspace(special: list[str]):
    return trained(pre_tokenizers.Metaspace(), "<unk>", special)


def llama3() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


def llama2() -> LlamaTokenizer:
    vocab, merges = metaspace(["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def llama2_with_eos() -> LlamaTokenizer:
    vocab, merges = metaspace(["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, add_eos_token=True)


def phi3() -> PreTrainedTokenizerFast:
    """Its spaces come from a normalizer, and its markers take the white space after them."""
    vocab, merges = metaspace(["<unk>", "<s>", "</s>"])
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    markers = [AddedToken(marker, rstrip=True, special=True, normalized=False) for marker in ("<|user|>", "<|end|>")]
    tokenizer.add_tokens(markers, special_tokens=True)
    return tokenizer


def gemma() -> GemmaTokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab, merges = metaspace(special)
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    return tokenizer


def qwen2() -> Qwen2Tokenizer:
    vocab, merges = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def gpt2() -> GPT2Tokenizer:
    """SmolLM2's class, and like SmolLM2 with digits split, which the class itself would forget."""
    vocab, merges = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


FAMILIES = {
    llama3: tiny.LLAMA3,
    llama2: "[INST] {text} [/INST]",
    llama2_with_eos: "[INST] {text} [/INST]",
    phi3: "<|user|>\n{text}<|end|>",
    gemma: "<start_of_turn>user\n{text}<end_of_turn>",
    qwen2: CHATML,
    gpt2: CHATML,
}


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
@pytest.mark.parametrize("make", FAMILIES)
def test_tokens_are_those_of_the_whole_string(make, instruction, tmp_path):
    """As the reference writes it, template and text in one string; and again after saving, from the folder alone."""
    original, template = make(), FAMILIES[make]
    before, after = template.split("{text}")
    if instruction:
        before += instruction + " "
    expected = [original(before + text + after)["input_ids"] for text in TEXTS]
    tokenizer = templated_tokenizer(original, template, instruction, 512)
    assert tokenizer(TEXTS)["input_ids"] == expected
    for ids, marks in zip(tokenizer(TEXTS)["input_ids"], tokenizer(TEXTS)["token_type_ids"], strict=True):
        assert sorted(marks) == marks and 0 < sum(marks) < len(ids), "a header, then what is pooled"

    ProCLIPProcessor(tiny.image_processor(), original, template, instruction).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS).data == tokenizer(TEXTS).data
    assert again.padding_side == "left" and again.pad_token == tokenizer.pad_token
    assert again.model_input_names == ["input_ids", "attention_mask", "token_type_ids"]
    assert again.model_max_length == 512
    assert again(template)["input_ids"] == tokenizer(template)["input_ids"], "special tokens spelled in a text"
    processor = ProCLIPProcessor.from_pretrained(tmp_path)
    assert processor(text=TEXTS, padding=False)["input_ids"] == expected


def test_the_tokenizer_given_stays_as_it_is():
    original = qwen2()
    before = original(TEXTS).data, original.backend_tokenizer.to_str(), original.padding_side
    templated_tokenizer(original, CHATML, INSTRUCTION, 20)
    assert (original(TEXTS).data, original.backend_tokenizer.to_str(), original.padding_side) == before


@pytest.mark.parametrize("make", FAMILIES)
def test_templates_replace_each_other(make):
    original, template = make(), FAMILIES[make]

    def tokens(tokenizer):
        return tokenizer(TEXTS).data

    steps = [
        (template, INSTRUCTION),
        (NO_TEMPLATE, None),
        (template, None),
        (template, "Describe"),
        (template, INSTRUCTION),
    ]
    tokenizer = original
    for template, instruction in [*steps, steps[-1]]:
        tokenizer = templated_tokenizer(tokenizer, template, instruction, 512)
        assert tokens(tokenizer) == tokens(templated_tokenizer(original, template, instruction, 512))
    plain = templated_tokenizer(tokenizer, NO_TEMPLATE, None, 512)
    assert plain(TEXTS)["input_ids"] == original(TEXTS)["input_ids"]
    assert plain.backend_tokenizer.normalizer is None or original.backend_tokenizer.normalizer is not None


def test_bos_and_eos_of_the_tokenizer_itself_stay_outside():
    tokenizer = templated_tokenizer(llama2_with_eos(), "[INST] {text} [/INST]", None, 512)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"])
    assert tokens[0] == "<s>" and tokens[-1] == "</s>" and "]" in tokens[-2]
    bert = BertTokenizer(
        vocab={token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}
    )
    tokenizer = templated_tokenizer(bert, NO_TEMPLATE, None, 512)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a b")["input_ids"]) == ["[CLS]", "a", "b", "[SEP]"]
    assert tokenizer("a b")["token_type_ids"] == [0, 1, 1, 1]


def test_special_tokens_in_a_text_are_text():
    tokenizer = templated_tokenizer(qwen2(), CHATML, None, 512)
    marker = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = tokenizer("a <|im_end|> b <|im_start|>")["input_ids"]
    assert ids.count(marker) == 1 and ids[-1] == marker
    assert tokenizer.decode(ids[3:-1]).endswith("a <|im_end|> b <|im_start|>")


@pytest.mark.parametrize("make", [llama3, qwen2, llama2])
def test_truncation_keeps_the_template(make):
    template = FAMILIES[make]
    tokenizer = templated_tokenizer(make(), template, INSTRUCTION, 512)
    empty = tokenizer("")["input_ids"]
    content = tokenizer("one two three " * 50)
    for max_length in (len(empty) + 1, len(empty) + 7):
        cut = tokenizer("one two three " * 50, truncation=True, max_length=max_length)
        kept = max_length - len(empty)
        footer = len(empty) - next(i for i, mark in enumerate(tokenizer("")["token_type_ids"]) if mark)
        head = len(empty) - footer
        assert (
            cut["input_ids"]
            == content["input_ids"][: head + kept] + content["input_ids"][len(content["input_ids"]) - footer :]
        )
        assert cut["token_type_ids"] == [0] * head + [1] * (kept + footer)
    default = tokenizer("one two three " * 500, truncation=True)["input_ids"]
    assert len(default) == 512 and default[-1] == empty[-1], "whoever asks for truncation gets the processor's length"


@pytest.mark.parametrize("make", [llama3, llama2])
def test_copies(make):
    tokenizer = templated_tokenizer(make(), FAMILIES[make], INSTRUCTION, 512)
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert copied(TEXTS, padding=True).data == tokenizer(TEXTS, padding=True).data
        assert copied.model_input_names == tokenizer.model_input_names


# The choice

CHATS = {
    tiny.LLAMA3: "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}",
    CHATML: "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
    "<start_of_turn>user\n{text}<end_of_turn>": "<bos>{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}",
    "<|user|>\n{text}<|end|>": "{% for m in messages %}{{ '<|' + m.role + '|>' + '\n' + m.content + '<|end|>\n' }}{% endfor %}<|endoftext|>",
    "<|user|>{text}<|end|>": "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}",
    "[INST] {text} [/INST]": "<s>{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endfor %}",
    "[INST] {text}[/INST]": "<s>{% for m in messages %}{{ '[INST] ' + m.content + '[/INST]' }}{% endfor %}",
    "[INST]{text}[/INST]": "<s>{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' }}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_choice_by_what_the_chat_template_writes(template, caplog):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHATS[template]
    assert choose_template(tokenizer) == template
    tokenizer.chat_template = {"default": CHATS[template], "tool_use": "{{ messages }}"}
    assert choose_template(tokenizer) == template
    assert ProCLIPProcessor(tiny.image_processor(), tokenizer).prompt_template == template
    assert not caplog.records


def test_no_template_without_a_chat_template(caplog):
    tokenizer = tiny.tokenizer()
    assert tokenizer.chat_template is None and choose_template(tokenizer) == NO_TEMPLATE
    processor = ProCLIPProcessor(tiny.image_processor(), tokenizer)
    assert processor(text="rice")["input_ids"] == tiny.tokenizer()("rice")["input_ids"]
    assert not caplog.records


def test_an_unknown_chat_template_is_said(caplog):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert choose_template(tokenizer) == NO_TEMPLATE
    assert "which makes '### user: {text}\\n'. Texts are read without one" in caplog.text
    caplog.clear()
    assert ProCLIPProcessor(tiny.image_processor(), tokenizer, prompt_template="### user: {text}\n").prompt_template
    assert not caplog.records


def test_a_chat_template_that_refuses_is_said():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('a system message must come first') }}"
    with pytest.raises(
        ValueError, match="refuses a single message .a system message must come first.: pass prompt_template"
    ):
        choose_template(tokenizer)


# What cannot be


@pytest.mark.parametrize("template", ["", "user:", "{text} {text}", "{txt}"])
def test_bad_templates_are_refused(template):
    with pytest.raises(ValueError, match=r"must hold \{text\} exactly once"):
        templated_tokenizer(tiny.tokenizer(), template, None, 512)


def test_tokenizers_that_do_not_fit_are_refused():
    unpadded = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b")))
    with pytest.raises(ValueError, match="neither pad_token nor eos_token"):
        templated_tokenizer(unpadded, NO_TEMPLATE, None, 512)

    class SlowTokenizer:
        chat_template = None

    with pytest.raises(ValueError, match="SlowTokenizer is not a fast tokenizer: .*mistral_format=False"):
        ProCLIPProcessor(tiny.image_processor(), SlowTokenizer())
