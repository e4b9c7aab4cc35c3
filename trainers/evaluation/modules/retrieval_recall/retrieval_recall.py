"""Recall@k of image-to-text and text-to-image retrieval as a module of `evaluate`. The card beside this file says what goes in and comes out."""

import datasets
import evaluate
import numpy as np
import torch

from trainers.evaluation import retrieval_recall


_DESCRIPTION = "Recall@k of image-to-text and text-to-image retrieval, exact, with any number of captions an image."

_INPUTS = """
Args:
    predictions: embeddings of the texts, `(num_texts, dim)`, of any length and floating dtype.
    references: `(num_texts,)` whole numbers, the row in `image_embeddings` that each text describes.
    image_embeddings: `(num_images, dim)`, all at once: images are fewer than texts, and are not collected in batches.
    ks: the k to report, (1, 5, 10) unless told otherwise.
Returns:
    `i2t_r@k` and `t2i_r@k` for every k, fractions between 0 and 1.
"""

_CITATION = """
@inproceedings{karpathy2015deep,
  title={Deep Visual-Semantic Alignments for Generating Image Descriptions},
  author={Karpathy, Andrej and Fei-Fei, Li},
  booktitle={Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
  year={2015}
}
"""


class RetrievalRecall(evaluate.Metric):
    """[`trainers.evaluation.retrieval_recall`] with the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        # float64 holds every float32 and bfloat16 as it is.
        embedding = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": embedding, "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, image_embeddings=None, ks=(1, 5, 10)) -> dict[str, float]:
        if image_embeddings is None:
            raise ValueError("retrieval_recall needs image_embeddings: compute(..., image_embeddings=...)")
        texts = torch.from_numpy(np.asarray(predictions, dtype=np.float64))
        images = torch.as_tensor(image_embeddings).double()
        return retrieval_recall(images, texts, torch.as_tensor(references), ks)
