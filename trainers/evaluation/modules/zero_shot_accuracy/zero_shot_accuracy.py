"""Zero-shot accuracy as a module of `evaluate`. The card beside this file says what goes in and comes out."""

import datasets
import evaluate
import numpy as np
import torch

from trainers.evaluation import zero_shot_accuracy
from trainers.evaluation.scoring.metrics import mean_per_class_accuracy, zero_shot_ranks


_DESCRIPTION = (
    "Share of the images whose class is among the k nearest class embeddings, and its mean over the classes."
)

_INPUTS = """
Args:
    predictions: embeddings of the images, `(num_images, dim)`, of any length and floating dtype.
    references: `(num_images,)` whole numbers, the row in `class_embeddings` that each image belongs to.
    class_embeddings: `(num_classes, dim)`, one for each class, such as `trainers.evaluation.zero_shot_classifier` makes of prompts.
    ks: the k to report, (1, 5) unless told otherwise.
Returns:
    `topk` for every k, and `mean_per_class`, the mean over the classes that have images of their top-1 accuracy; fractions between 0 and 1.
"""

_CITATION = """
@inproceedings{radford2021learning,
  title={Learning Transferable Visual Models From Natural Language Supervision},
  author={Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and Agarwal, Sandhini and Sastry, Girish
    and Askell, Amanda and Mishkin, Pamela and Clark, Jack and Krueger, Gretchen and Sutskever, Ilya},
  booktitle={International Conference on Machine Learning},
  year={2021}
}
"""


class ZeroShotAccuracy(evaluate.Metric):
    """[`trainers.evaluation.zero_shot_accuracy`] and the mean over classes with the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        # float64 holds every float32 and bfloat16 as it is.
        embedding = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": embedding, "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, class_embeddings=None, ks=(1, 5)) -> dict[str, float]:
        if class_embeddings is None:
            raise ValueError("zero_shot_accuracy needs class_embeddings: compute(..., class_embeddings=...)")
        images = torch.from_numpy(np.asarray(predictions, dtype=np.float64))
        classes = torch.as_tensor(class_embeddings).double()
        labels = torch.as_tensor(references)
        ranks, _ = zero_shot_ranks(images, classes, labels)
        return {
            **zero_shot_accuracy(images, classes, labels, ks),
            "mean_per_class": mean_per_class_accuracy(ranks == 0, labels),
        }
