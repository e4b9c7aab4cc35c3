"""`/v1/embeddings` as OpenAI's clients use it: the model's embeddings, and one JSON error for what cannot be answered."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainers.tiny_encoders import tiny_proclip


TEXTS = ["a red fox", "zwei Hunde", ""]
IMAGE = Image.new("RGBA", (20, 16), (200, 0, 0, 60))


def data_url(image=IMAGE):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def post(client, status=200, **body):
    response = client.post("/v1/embeddings", json=body)
    assert response.status_code == status, response.text
    return response.json()


@torch.no_grad()
def expected(**inputs):
    model, processor = tiny_proclip(max_length=64)
    output = model(**processor(**inputs, return_tensors="pt"))
    return (output.image_embeds if "images" in inputs else output.text_embeds).numpy()


def values(answer):
    assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    return np.array([row["embedding"] for row in answer["data"]])


def test_texts_and_images_in_one_request(client):
    answer = post(
        client, input=[TEXTS[0], data_url(), {"text": TEXTS[1]}, {"image": data_url()}, TEXTS[2]], model="tiny"
    )
    texts, image = expected(text=TEXTS), expected(images=[IMAGE])
    np.testing.assert_allclose(values(answer), np.stack([texts[0], image[0], texts[1], image[0], texts[2]]), atol=1e-5)
    _, processor = tiny_proclip(max_length=64)
    num_tokens = sum(len(ids) for ids in processor.tokenizer(TEXTS)["input_ids"])
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert answer["object"] == "list" and answer["model"] == "tiny"


def test_one_string_base64_and_dimensions(client):
    (row,) = post(client, input=TEXTS[0], encoding_format="base64", user="me")["data"]
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(row["embedding"]), "<f4"), expected(text=TEXTS[:1])[0], atol=1e-5
    )
    cut = expected(text=TEXTS[:1])[:, :4]
    np.testing.assert_allclose(
        values(post(client, input=TEXTS[0], dimensions=4)), cut / np.linalg.norm(cut), atol=1e-5
    )


def test_a_long_text_is_cut_only_if_asked(client):
    message = post(client, 400, input=["a", "word " * 100])["error"]["message"]
    assert message.startswith("input[1] has ") and message.endswith(
        'the model reads 64: shorten it, or pass "truncate": true'
    )
    np.testing.assert_allclose(
        values(post(client, input="word " * 100, truncate=True)), expected(text=["word " * 100]), atol=1e-5
    )


@pytest.mark.parametrize(
    ("body", "status", "message", "param"),
    [
        ({}, 400, "input: Field required", "input"),
        ({"input": []}, 400, "input must be a string, ", "input"),
        ({"input": [1, 2, 3]}, 400, "input must be a string, ", "input"),
        ({"input": [["a"]]}, 400, "input must be a string, ", "input"),
        ({"input": [{"image_url": "x"}]}, 400, "input must be a string, ", "input"),
        ({"input": "a", "inptu": "b"}, 400, "inptu: Extra inputs are not permitted", "inptu"),
        (
            {"input": "a", "encoding_format": "int8"},
            400,
            "encoding_format: Input should be 'float' or 'base64'",
            "encoding_format",
        ),
        ({"input": "a", "dimensions": 0}, 400, "dimensions: Input should be greater than or equal to 1", "dimensions"),
        ({"input": "a", "dimensions": 17}, 400, "dimensions must be at most 16, got 17", "dimensions"),
        ({"input": "a", "model": "gpt"}, 404, "there is no model 'gpt' here, but 'tiny'", "model"),
        ({"input": ["a"] * 9}, 413, "9 inputs, and at most 8 are taken", "input"),
        ({"input": "a" * 30_000}, 413, "the body has more than 20,000 bytes", None),
        ({"input": {"image": "https://example.com/a.png"}}, 400, "input must be a data URL, ", "input"),
        ({"input": {"image": "/etc/passwd"}}, 400, "input must be a data URL, ", "input"),
        ({"input": ["a", "data:image/png;base64,AAAA"]}, 400, "input[1] cannot be read as an image: ", "input"),
        ({"input": "data:image/png;base64,no!"}, 400, "input cannot be read as an image: ", "input"),
        ({"input": data_url(Image.new("L", (1, 900)))}, 400, "input cannot be read as an image: a strip of", "input"),
    ],
)
def test_a_request_that_cannot_be_answered(client, body, status, message, param):
    error = post(client, status, **body)["error"]
    assert error["message"].startswith(message) and "\n" not in error["message"]
    assert error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"nonsense", b"[]", b'"a"', b"\xff\xfe", b"[" * 10_000])
def test_a_body_that_is_no_object(client, body):
    response = client.post("/v1/embeddings", content=body)
    assert response.status_code == 400 and response.json()["error"]["message"].startswith(
        "the body is not a JSON object: "
    )


def test_an_error_of_the_model_is_an_answer(client, encoder, monkeypatch):
    monkeypatch.setattr(encoder, "encode_images", lambda inputs: 1 / 0)
    assert post(client, 500, input=data_url())["error"]["type"] == "server_error"
    post(client, input="a")  # and the server goes on


def test_health_models_metrics_and_no_such_page(client):
    assert client.get("/health").json() == {"status": "ok", "model": "tiny"}
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    post(client, input=["a", "b", data_url()])
    post(client, 400)
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'proclip_requests_total{status="200"} 1.0',
        'proclip_requests_total{status="400"} 1.0',
        'proclip_inputs_total{kind="text"} 2.0',
        'proclip_inputs_total{kind="image"} 1.0',
        "proclip_request_seconds_count 2.0",
        "proclip_waiting_inputs 0.0",
    ):
        assert line in lines
    for response in (client.get("/docs"), client.get("/v1/embeddings")):
        assert response.status_code in (404, 405) and response.json()["error"]["type"] == "invalid_request_error"
    assert json.loads(client.get("/docs").text)["error"]["message"] == "GET /docs: Not Found"
