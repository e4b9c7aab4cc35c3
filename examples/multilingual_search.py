"""Align a multilingual LLM with a CLIP by translated captions, then search images in any of the languages.

    python examples/multilingual_search.py CLIP LLM translations.csv photos/ "un gato negro" "eine schwarze Katze"

translations.csv has a column per language (en, es, de, ...) and translations of each other in each row; CLIP's own text encoder reads the
column en. Nothing but the adapter is trained. Take an LLM that has read the languages, best after stage 0.
"""

import argparse
import csv
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from trainers import RepresentationInheritanceConfig, RepresentationInheritanceTrainer
from trainers.alignment.input_statistics import fit_input_statistics
from trainers.data import TextEmbeddingStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", help="CLIP or SigLIP, a folder or a name on the Hub")
    parser.add_argument("llm", help="multilingual decoder LLM, a folder or a name on the Hub")
    parser.add_argument("translations", type=Path, help="CSV file with a column per language")
    parser.add_argument("images", type=Path, help="folder of images to search")
    parser.add_argument("queries", nargs="+", help="what to search for")
    parser.add_argument("--output", default="multilingual-output", help="folder for the result")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()

    with args.translations.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    texts = {language: [row[language] for row in table] for language in table[0]}

    clip, clip_processor = AutoModel.from_pretrained(args.clip), AutoProcessor.from_pretrained(args.clip)
    # What tells languages apart is projected out of the LLM's embeddings, so translations come closer.
    model = ProCLIPModel.from_vision_text_pretrained(
        clip, args.llm, adapter_input_norm="standardize", adapter_language_directions=len(texts) - 1
    )
    processor = ProCLIPProcessor(clip_processor.image_processor, AutoTokenizer.from_pretrained(args.llm))
    everything = [text for of_language in texts.values() for text in of_language]
    llm_store = TextEmbeddingStore.build(everything, model, processor, f"{args.output}/stores/llm")
    clip_store = TextEmbeddingStore.build(texts["en"], clip, clip_processor, f"{args.output}/stores/clip")
    fit_input_statistics(model, llm_store, texts)

    # In each language, the adapter learns CLIP's embedding of the English caption.
    rows = [{"text": row[language], "teacher_text": row["en"]} for row in table for language in texts]
    settings = RepresentationInheritanceConfig(
        f"{args.output}/training",
        max_steps=args.steps,
        learning_rate=1e-3,
        per_device_train_batch_size=min(256, len(rows)),
        save_strategy="no",
        report_to="none",
    )
    RepresentationInheritanceTrainer(
        model, settings, rows, text_store=llm_store, teacher_store=clip_store, processing_class=processor
    ).train()
    model.save_pretrained(args.output, lean=True)
    processor.save_pretrained(args.output)

    paths = sorted(str(path) for path in args.images.rglob("*") if path.suffix.lower() in {".jpg", ".png", ".webp"})
    with torch.inference_mode():
        batches = [processor(images=paths[i : i + 32], return_tensors="pt") for i in range(0, len(paths), 32)]
        image_embeds = torch.cat([model.eval()(**batch).image_embeds for batch in batches])
        text_embeds = model(**processor(text=args.queries, return_tensors="pt")).text_embeds
    for query, scores in zip(args.queries, text_embeds @ image_embeds.T):
        best = scores.topk(min(3, len(paths)))
        print(query + ":", ", ".join(f"{paths[i]} ({score:.2f})" for score, i in zip(*best)))


if __name__ == "__main__":
    main()
