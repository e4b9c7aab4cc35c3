"""Give a CLIP another LLM as its text encoder, from captions alone (stage 1 of ProCLIP).

    python examples/swap_llm.py openai/clip-vit-large-patch14 Qwen/Qwen3-0.6B captions.txt clip-qwen3

Only the adapter is trained, so the image encoder and its image embeddings stay those of the CLIP. captions.txt has one caption per line; a
tenth of them is held out, to see how well the new text encoder reproduces CLIP's embeddings. It costs one pass of both text encoders over
the captions, and minutes for the adapter.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from trainers import RepresentationInheritanceConfig, RepresentationInheritanceTrainer
from trainers.data import TextEmbeddingStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", help="CLIP or SigLIP, a folder or a name on the Hub")
    parser.add_argument("llm", help="decoder LLM, a folder or a name on the Hub")
    parser.add_argument("captions", type=Path, help="text file with one caption per line")
    parser.add_argument("output", help="folder for the result")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256)
    args = parser.parse_args()

    lines = args.captions.read_text(encoding="utf-8").splitlines()
    captions = list(dict.fromkeys(line for line in lines if line.strip()))  # each once
    held_out, captions = captions[::10], [caption for i, caption in enumerate(captions) if i % 10]

    clip, clip_processor = AutoModel.from_pretrained(args.clip), AutoProcessor.from_pretrained(args.clip)
    # Embeddings of an LLM that was not tuned on captions lie close together: "standardize" spreads them.
    model = ProCLIPModel.from_vision_text_pretrained(clip, args.llm, adapter_input_norm="standardize")
    processor = ProCLIPProcessor(clip_processor.image_processor, AutoTokenizer.from_pretrained(args.llm))

    stores = Path(args.output) / "stores"
    llm_store = TextEmbeddingStore.build(captions + held_out, model, processor, stores / "llm")
    clip_store = TextEmbeddingStore.build(captions + held_out, clip, clip_processor, stores / "clip")

    settings = RepresentationInheritanceConfig(
        f"{args.output}/training",
        max_steps=args.steps,
        learning_rate=1e-3,  # the papers' 1e-5 is for hundreds of thousands of steps
        per_device_train_batch_size=min(args.batch_size, len(captions)),
        save_strategy="no",
        report_to="none",
    )
    rows = [{"text": caption} for caption in captions]
    RepresentationInheritanceTrainer(
        model, settings, rows, text_store=llm_store, teacher_store=clip_store, processing_class=processor
    ).train()

    with torch.inference_mode():
        ours = model.eval().get_text_features(llm_embeds=llm_store.lookup(held_out)).pooler_output
    cosines = torch.nn.functional.normalize(ours, dim=1) @ clip_store.lookup(held_out).T.float()
    found = (cosines.argmax(dim=1) == torch.arange(len(held_out))).float().mean()
    print(f"{found:.1%} of {len(held_out)} held-out captions are nearest to their own CLIP embedding")

    model.save_pretrained(args.output, lean=True)  # names the LLM and the hash of its weights
    processor.save_pretrained(args.output)
    print(f"the model is in {args.output}")


if __name__ == "__main__":
    main()
