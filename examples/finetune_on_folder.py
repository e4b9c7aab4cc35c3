"""Fine-tune a checkpoint on a folder of images with captions, without losing what it knew (stage 2 of ProCLIP).

    python examples/finetune_on_folder.py my-proclip photos/ tuned-proclip

Captions lie beside the images (photo.txt beside photo.jpg) or in the folder's metadata.jsonl. A tenth of the images is held out, and the
recall@1 among them is printed before and after. It costs one pass of the LLM over the captions, and a training of the image encoder.
"""

import argparse

import torch
from transformers import AutoModel, AutoProcessor

import modeling_proclip  # noqa: F401 - registers the classes
from trainers import ContrastiveTuningConfig, ContrastiveTuningTrainer
from trainers.data import PairSource, TextEmbeddingStore, iter_texts, open_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="ProCLIP checkpoint, a folder or a name on the Hub")
    parser.add_argument("images", help="folder of images with captions")
    parser.add_argument("output", help="folder for the result")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch-size", type=int, default=128, help="pairs that are compared with each other")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    args = parser.parse_args()

    model = AutoModel.from_pretrained(args.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.model)

    # The LLM is frozen: it reads every caption once, and training looks the embeddings up.
    source = PairSource(source=args.images)
    store = TextEmbeddingStore.build(iter_texts(source), model, processor, f"{args.output}/captions")

    pairs = open_pairs(source)
    held_out = max(2, len(pairs) // 10)
    split = torch.Generator().manual_seed(0)
    train, test = torch.utils.data.random_split(pairs, [len(pairs) - held_out, held_out], split)

    settings = ContrastiveTuningConfig(
        f"{args.output}/training",
        method="proclip",  # regularises the image encoder towards its EMA copy
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=min(args.batch_size, len(train)),
        gradient_caching_batch_size=32,  # the memory of 32 pairs, whatever the batch size
        save_strategy="no",
        report_to="none",
    )
    trainer = ContrastiveTuningTrainer(
        model, settings, train, eval_dataset=test, text_store=store, processing_class=processor
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for metric in ("i2t_r@1", "t2i_r@1"):
        print(
            f"{metric} of {held_out} held-out images: {before[f'eval_{metric}']:.3f} -> {after[f'eval_{metric}']:.3f}"
        )

    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    print(f"the model is in {args.output}")


if __name__ == "__main__":
    main()
