"""What is written for others holds no password, no token and no path of this machine, and nothing else is changed."""

import pytest

from hub_cards.scrubbing import holds_secret, scrub, scrub_text


HF_TOKEN = "hf_" + "aB3" * 11

SCRUBBED = {
    "https://alice:hunter2@data.corp/pairs/*.tar": "https://data.corp/pairs/*.tar",
    "https://data.corp/a.tar?X-Amz-Signature=0123&part=2": "https://data.corp/a.tar?X-Amz-Signature=***&part=2",
    "https://x.blob.example/a?sv=2024&sig=Ab%2F12": "https://x.blob.example/a?sv=2024&sig=***",
    "https://raw.example/a?token=AB12&X-Amz-Security-Token=c": "https://raw.example/a?token=***&X-Amz-Security-Token=***",
    "s3://KEY:SECRET@bucket/a": "s3://bucket/a",
    f"the token {HF_TOKEN}, and ghp_{'a1' * 18}": "the token ***, and ***",
    "HF_TOKEN=0123456789abc": "HF_TOKEN=***",
    '{"api_key": "s3cr3t-value"}': '{"api_key": "***"}',
    "Authorization: Bearer abcdefghijklmnop": "Authorization: Bearer ***",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n-----END OPENSSH PRIVATE KEY-----\nafter": "***\nafter",
    "trained on /home/alice/secret-project/rows.csv, once": "trained on rows.csv, once",
    "see `/mnt/disk1/alice/x` and file:///data/a/b": "see `x` and b",
    "of ~/secret/x and C:\\Users\\alice\\x": "of x and x",
}
PATHS = {
    "/home/alice/secret-project/llm": "llm",
    "/any/place/at all/llm": "llm",
    "../../alice-secret-project/*.tar": "*.tar",
    "./secret/rows.csv": "rows.csv",
    r"\\server\share\rows.csv": "rows.csv",
    "/home/alice": "~",
}
KEPT = (
    "owner/name",
    "/think",
    "a/b/c",
    "</s>",
    "<|im_start|>user\n{text}<|im_end|>",
    r"vision_model\..*\.(q_proj|v_proj)",
    "https://example.org/home/alice/page?id=3#top",
    "https://example.org/?tokens=3&keyboard=de&design=1",
    "2510.18795",
    "and/or 1/2 of bos_token: 12345678",
    "password: the reader's own",
    "a photo of {}",
)


@pytest.mark.parametrize("text", SCRUBBED)
def test_secrets_and_paths_are_taken_out_of_prose(text):
    assert scrub_text(text) == SCRUBBED[text]
    assert scrub({"a": [text]}) == {"a": [SCRUBBED[text]]}


@pytest.mark.parametrize("path", PATHS)
def test_a_value_that_is_a_path_becomes_its_last_part(path):
    assert scrub({"source": path}) == {"source": PATHS[path]}


def test_a_relative_path_is_known_by_its_key():
    paths = {"name_or_path": "models/secret-project/llm", "source": "secret/rows/x.csv", "caption_files": "owner/name"}
    assert scrub(paths) == {"name_or_path": "llm", "source": "x.csv", "caption_files": "owner/name"}
    assert scrub({"source": "https://example.org/a/b", "title": "a/b/c"}) == {
        "source": "https://example.org/a/b",
        "title": "a/b/c",
    }


@pytest.mark.parametrize("text", KEPT)
def test_everything_else_stays(text):
    assert scrub_text(text) == text and scrub([text, 1, None, {"n": 0.5}]) == [text, 1, None, {"n": 0.5}]


def test_values_of_keys_that_name_secrets_are_hidden():
    assert scrub({"hub_token": "x", "password": "y", "bos_token": "<s>", "secret": None}) == {
        "hub_token": "***",
        "password": "***",
        "bos_token": "<s>",
        "secret": None,
    }
    assert scrub({"instruction": "/home/a/b"}, keep={"instruction"}) == {"instruction": "/home/a/b"}


def test_the_home_goes_wherever_it_is_and_with_spaces(monkeypatch):
    monkeypatch.setenv("HOME", "/Benutzer/Alice B")
    assert scrub_text("in /Benutzer/Alice B/llm now") == "in llm now"


def test_tokens_are_found_in_files_that_must_stay_as_they_are():
    assert holds_secret(f'"x": "{HF_TOKEN}"') and holds_secret("-----BEGIN PRIVATE KEY-----")
    assert not holds_secret('{"hf": 1, "sk-": 2, "/home": 3}')


# Half a million characters each; one search that starts anew at each of them would take minutes.
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text", ["token", "eyJ-", "://", "/home", "/home/ ", " ~", "password='", "sk-", "hf_", "a", "?a&", "\\\\"]
)
def test_hostile_texts_take_no_time(text):
    assert scrub("?" + text * (500_000 // len(text)))
