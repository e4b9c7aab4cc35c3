"""Quantised embeddings are those of sentence-transformers, bit for bit, and come back within a step."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers.util import quantize_embeddings

from trainers.compute.quantization import Quantization


EMBEDS = torch.nn.functional.normalize(torch.randn(300, 12, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.mark.parametrize(("precision", "theirs"), [("float32", "float32"), ("int8", "int8"), ("binary", "ubinary")])
def test_codes_are_those_of_sentence_transformers(precision, theirs):
    quantization = Quantization.calibrated(precision, EMBEDS[:200])
    codes = quantization.encode(EMBEDS)
    expected = quantize_embeddings(EMBEDS, theirs, calibration_embeddings=EMBEDS[:200].numpy())
    assert codes.dtype == expected.dtype and quantization.num_bytes == codes[0].nbytes
    np.testing.assert_array_equal(codes, expected)
    again = Quantization.from_dict(json.loads(json.dumps(quantization.to_dict())))
    np.testing.assert_array_equal(again.encode(EMBEDS), codes)
    torch.testing.assert_close(again.decode(codes), quantization.decode(codes), atol=0, rtol=0)


def test_decoded_embeddings():
    torch.testing.assert_close(Quantization("float32", 12).decode(EMBEDS.numpy()), EMBEDS)
    binary = Quantization.calibrated("binary", EMBEDS)
    torch.testing.assert_close(binary.decode(binary.encode(EMBEDS)), torch.where(EMBEDS > 0, 1.0, -1.0))
    int8 = Quantization.calibrated("int8", EMBEDS)
    step = (EMBEDS.amax(0) - EMBEDS.amin(0)) / 255
    lost = EMBEDS - int8.decode(int8.encode(EMBEDS))
    assert (lost >= -1e-6).all() and (lost <= step + 1e-6).all()
    clipped = int8.decode(int8.encode(10 * EMBEDS))
    assert (clipped >= EMBEDS.amin(0) - 1e-6).all() and (clipped <= EMBEDS.amax(0) + 1e-6).all()


def test_a_dimension_that_is_constant():
    embeds = EMBEDS.clone()
    embeds[:, 3] = 0.25
    int8 = Quantization.calibrated("int8", embeds)
    torch.testing.assert_close(int8.decode(int8.encode(embeds))[:, 3], embeds[:, 3])
