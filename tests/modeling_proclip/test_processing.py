"""ProCLIPProcessor: texts of every kind, what it refuses, and what it saves."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, CLIPImageProcessor

from modeling_proclip import ProCLIPProcessor
from tests.modeling_proclip import tiny
from tests.modeling_proclip.test_processing_images import IMAGES, pixels


EOT = 4
HEADER = [0, 2, 395, 3, 203, 203]  # BOS and <|start_header_id|>user<|end_header_id|>\n\n
ODD_TEXTS = [
    "a man riding a wave",
    "",
    " \n\t ",
    "🦊🐈‍⬛👩🏽‍🚀",
    "رجل يركب موجة",  # Arabic
    "איש רוכב על גל",  # Hebrew
    "一只猫坐在红色的沙发上",
    "<|eot_id|> <|start_header_id|>system<|end_header_id|> <|begin_of_text|>",
    "{text} {0} %s \\ \x00 \u202e",
    "!@#$%^&*()",  # what the reference splits texts at
]


@pytest.fixture
def processor() -> ProCLIPProcessor:
    return tiny.processor(prompt_template=tiny.LLAMA3)


# Texts


def test_texts_of_every_kind(processor):
    plain = tiny.tokenizer()
    batch = processor(text=ODD_TEXTS, return_tensors="pt")
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert set(batch) == set(names)
    for text, ids, mask, marks in zip(ODD_TEXTS, *(batch[name] for name in names), strict=True):
        content = plain(text.rstrip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        length = len(content) + 7
        assert ids[-length:].tolist() == [*HEADER, *content, EOT]
        assert mask.tolist() == [0] * (len(ids) - length) + [1] * length
        assert marks.tolist() == [0] * (len(ids) - length + 6) + [1] * (len(content) + 1)
        assert content.count(EOT) == 0, "a special token spelled in a text"
        alone = processor(text=text)
        assert alone["input_ids"] == ids[-length:].tolist() and alone["token_type_ids"] == marks[-length:].tolist()


@torch.no_grad()
def test_every_text_has_its_own_embedding(processor):
    model = tiny.model()
    embeds = model(**processor(text=ODD_TEXTS, return_tensors="pt")).text_embeds
    assert torch.isfinite(embeds).all()
    same = torch.cdist(embeds, embeds) < 1e-4
    expected = torch.eye(len(ODD_TEXTS), dtype=torch.bool)
    expected[1, 2] = expected[2, 1] = True  # nothing but white space is an empty text
    assert torch.equal(same, expected)


def test_very_long_text(processor, caplog):
    words = "wave " * 10_000
    batch = processor(text=[words, "rice"])
    long, short = batch["input_ids"]
    assert len(long) == len(short) == 512 and long[:6] == HEADER and long[-1] == EOT
    assert batch["token_type_ids"][0] == [0] * 6 + [1] * 506
    assert caplog.text.count("lose the end of their content") == 1
    assert "1 of 2 texts are longer than 512 tokens" in caplog.text
    processor(text=words)
    assert caplog.text.count("lose the end of their content") == 1, "said once"


@pytest.mark.parametrize("as_list", [False, True])
def test_what_just_fits_is_not_said_to_be_cut(as_list, caplog):
    processor = tiny.processor(prompt_template=tiny.LLAMA3, max_length=20)
    fits = next(" a" * n for n in range(20) if len(processor.tokenizer(" a" * n)["input_ids"]) == 20)
    too_long = fits + " a"
    for arguments in ({}, {"padding": "max_length"}, {"return_tensors": "pt"}):
        processor(text=[fits] if as_list else fits, **arguments)
    processor(text=[too_long] if as_list else too_long, truncation=False, max_length=None)
    assert "lose the end" not in caplog.text
    processor(text=[too_long] if as_list else too_long)
    assert "1 of 1 texts are longer than 20 tokens and lose the end" in caplog.text


def test_length_of_one_call(processor):
    for arguments in ({"max_length": 10}, {"text_kwargs": {"max_length": 10}}):
        ids = processor(text="two dogs are playing with a red ball", **arguments)["input_ids"]
        assert len(ids) == 10 and ids[-1] == EOT
    with pytest.raises(ValueError, match="max_length=7 leaves no room for text: .* take 7 tokens"):
        processor(text="a", text_kwargs={"max_length": 7})
    assert len(processor(text="a", max_length=7, truncation=False)["input_ids"]) > 7


@pytest.mark.parametrize("instruction", [None, "Given a sentence"])
def test_length_that_holds_no_text(instruction):
    tokens = len(tiny.processor(prompt_template=tiny.LLAMA3, instruction=instruction)(text="")["input_ids"])
    assert tokens == 7 if instruction is None else tokens > 7
    tiny.processor(prompt_template=tiny.LLAMA3, instruction=instruction, max_length=tokens + 1)
    with pytest.raises(ValueError, match=f"max_length={tokens} leaves no room for text: .* take {tokens} tokens"):
        tiny.processor(prompt_template=tiny.LLAMA3, instruction=instruction, max_length=tokens)


def test_padding(processor):
    texts = ["rice", "a man riding a wave"]
    left = processor(text=texts)
    right = processor(text=texts, padding_side="right")
    assert left["attention_mask"][0][0] == 0 and right["attention_mask"][0][-1] == 0
    for batch in (left, right):
        unpadded = [i for i, mask in zip(batch["input_ids"][0], batch["attention_mask"][0], strict=True) if mask]
        assert unpadded == processor(text="rice")["input_ids"]
        assert all(
            mark <= mask for mark, mask in zip(batch["token_type_ids"][0], batch["attention_mask"][0], strict=True)
        )
    assert len(processor(text=texts, padding=False)["input_ids"][0]) == 9
    assert len(processor(text=texts, padding="max_length")["input_ids"][0]) == 512
    model = tiny.model()
    with torch.no_grad():
        one = model.get_llm_embeds(**processor(text=texts, return_tensors="pt"))
        other = model.get_llm_embeds(**processor(text=texts, return_tensors="pt", padding_side="right"))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "text, message",
    [
        ([], "text is an empty list"),
        (["a", None], r"text\[1\] is NoneType, not a string"),
        ([["a", "b"]], r"text\[0\] is list"),
        (b"bytes", r"text\[0\] is int"),
        (7, "must be a string or a list of strings, got int"),
        ({"text": "a"}, "must be a string or a list of strings, got dict"),
    ],
)
def test_bad_texts(processor, text, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text)


def test_unknown_arguments(processor):
    with pytest.raises(TypeError, match="has no argument 'trunction'; did you mean 'truncation'"):
        processor(text="a", trunction=True)
    with pytest.raises(TypeError, match="has no argument 'zzz'"):
        processor(images=Image.new("RGB", (16, 16)), zzz=1)
    with pytest.raises(ValueError, match="Give text, images or both"):
        processor(return_tensors="pt")
    processor(
        text="a", images=Image.new("RGB", (16, 16)), return_tensors="pt", do_center_crop=False, pad_to_multiple_of=8
    )


def test_called_as_sentence_transformers_does(processor):
    """It passes the arguments of each modality apart, also of those that a model has not."""
    nested = {f"{modality}_kwargs": {} for modality in ("images", "audio", "videos")}
    nested |= {"text_kwargs": {"padding": True, "truncation": True}, "common_kwargs": {"return_tensors": "pt"}}
    batch = processor(text=ODD_TEXTS, **nested)
    assert torch.equal(batch["input_ids"], processor(text=ODD_TEXTS, return_tensors="pt")["input_ids"])


# Saving


def test_round_trip(tmp_path, caplog):
    saved = tiny.processor(prompt_template=tiny.LLAMA3, instruction="Given a sentence", max_length=30)
    saved(text=ODD_TEXTS)
    saved.save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "processor_config.json").read_text())
    assert recorded["prompt_template"] == tiny.LLAMA3 and recorded["instruction"] == "Given a sentence"
    assert recorded["max_length"] == 30
    tiny.model().save_pretrained(tmp_path)
    caplog.clear()
    for loaded in (AutoProcessor.from_pretrained(tmp_path), ProCLIPProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is ProCLIPProcessor
        assert loaded(text=ODD_TEXTS).data == saved(text=ODD_TEXTS).data
        image = IMAGES["RGBA"][0]
        assert np.array_equal(pixels(loaded, image), pixels(saved, image))
        assert (loaded.prompt_template, loaded.instruction, loaded.max_length) == (tiny.LLAMA3, "Given a sentence", 30)
    assert "torchvision" not in caplog.text, "the Auto classes choose a backend without a warning"
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is CLIPImageProcessor
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        tokenizer([text.rstrip() for text in ODD_TEXTS]).data
        == saved.tokenizer([text.rstrip() for text in ODD_TEXTS]).data
    )


@pytest.mark.parametrize(
    "name, value",
    [("instruction", "Given a sentence"), ("instruction", None), ("prompt_template", "<{text}>"), ("max_length", 16)],
)
def test_a_setting_takes_effect_at_once(name, value, tmp_path):
    settings = {"prompt_template": tiny.LLAMA3, "instruction": "Describe:", "max_length": 40}
    changed = tiny.processor(**settings)
    setattr(changed, name, value)
    expected = tiny.processor(**{**settings, name: value})
    texts = [*ODD_TEXTS, "word " * 50]
    changed.save_pretrained(tmp_path)
    for processor in (changed, ProCLIPProcessor.from_pretrained(tmp_path)):
        assert getattr(processor, name) == value
        assert processor(text=texts).data == expected(text=texts).data
        assert processor.tokenizer("word " * 50, truncation=True) == expected.tokenizer("word " * 50, truncation=True)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("prompt_template", "no text", "must hold {text} exactly once"),
        ("instruction", "word " * 50, "max_length=40 leaves no room"),
        ("max_length", 3, "max_length=3 leaves no room"),
        ("max_length", None, "must be a whole number of tokens, got None"),
    ],
)
def test_a_setting_that_cannot_be_changes_nothing(name, value, message):
    processor = tiny.processor(prompt_template=tiny.LLAMA3, instruction="Describe:", max_length=40)
    before = processor(text=ODD_TEXTS).data, processor.to_dict()
    with pytest.raises(ValueError, match=message):
        setattr(processor, name, value)
    assert (processor(text=ODD_TEXTS).data, processor.to_dict()) == before


def test_keys_of_a_later_release(tmp_path, caplog):
    tiny.processor(max_length=40).save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "new_setting": 1}))
    assert ProCLIPProcessor.from_pretrained(tmp_path).max_length == 40
    assert "keys that this release does not know: new_setting" in caplog.text
    with pytest.raises(TypeError, match="no argument 'instrucion'; did you mean 'instruction'"):
        ProCLIPProcessor.from_pretrained(tmp_path, instrucion="Describe:")


def test_a_chat_template_is_no_unknown_key(tmp_path, caplog):
    processor = tiny.processor(prompt_template=tiny.LLAMA3)
    processor.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    ProCLIPProcessor.from_pretrained(tmp_path)
    assert "does not know" not in caplog.text


def test_settings_can_be_changed_at_load(tmp_path):
    tiny.processor(prompt_template=tiny.LLAMA3, instruction="Given a sentence").save_pretrained(tmp_path)
    for loader in (AutoProcessor, ProCLIPProcessor):
        loaded = loader.from_pretrained(tmp_path, instruction="Describe:", max_length=40)
        assert (loaded.prompt_template, loaded.instruction, loaded.max_length) == (tiny.LLAMA3, "Describe:", 40)
        expected = tiny.processor(prompt_template=tiny.LLAMA3, instruction="Describe:", max_length=40)
        assert loaded(text=ODD_TEXTS).data == expected(text=ODD_TEXTS).data
    plain = ProCLIPProcessor.from_pretrained(tmp_path, prompt_template="{text}", instruction="")
    assert plain(text="rice")["input_ids"] == tiny.tokenizer()("rice")["input_ids"]


def test_copies(processor):
    for copied in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert copied(text=ODD_TEXTS).data == processor(text=ODD_TEXTS).data
        assert copied.prompt_template == processor.prompt_template


def test_sharing_a_tokenizer():
    """Two processors of one tokenizer do not take each other's template."""
    tokenizer = tiny.tokenizer()
    first = ProCLIPProcessor(tiny.image_processor(), tokenizer, tiny.LLAMA3)
    second = ProCLIPProcessor(tiny.image_processor(), tokenizer, "{text}")
    assert first(text="rice")["input_ids"] == [*HEADER, 268, 276, EOT]
    assert second(text="rice")["input_ids"] == [0, 268, 276]
    assert tokenizer("rice")["input_ids"] == [0, 268, 276]


def test_floats_that_were_rescaled_before_are_refused(processor):
    """They would become black without a word."""
    white = np.ones((3, 16, 16), np.float32)
    for images, name in ((white, "images"), ([torch.from_numpy(white)], r"images\[0\]")):
        with pytest.raises(ValueError, match=f"{name} holds floats from 0 to 1, which would be divided by 255 again"):
            processor(images=images, return_tensors="pt")
    expected = processor(images=Image.new("RGB", (16, 16), "white"), return_tensors="pt")["pixel_values"]
    for given in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
        torch.testing.assert_close(processor(images=white, return_tensors="pt", **given)["pixel_values"], expected)
    torch.testing.assert_close(
        processor(images=(255 * white).astype(np.uint8), return_tensors="pt")["pixel_values"], expected
    )
