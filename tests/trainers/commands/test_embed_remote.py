"""`proclip embed` with addresses in an object store: texts are read, stores are verified and looked up in, and never written."""

import torch

from tests.object_server import SECRET
from tests.trainers.commands.test_embed import refused, run
from tests.trainers.tiny_encoders import make_texts, tiny_proclip
from trainers.data import TextEmbeddingStore


def test_texts_and_stores_of_a_bucket(bucket, tmp_path):
    for part in tiny_proclip(max_length=20):
        part.save_pretrained(tmp_path / "model")
    texts = make_texts(12)
    for number in range(2):
        lines = "".join(f"{text}\n" for text in texts[6 * number : 6 * number + 6])
        bucket.system.pipe_file(f"{bucket.url}/texts/{number}.txt", lines.encode())
    source, common = f"{bucket.url}/texts/*.txt", ["--model", tmp_path / "model"]
    done = run(source, *common, "--output", tmp_path / "store")
    assert done.exit_code == 0 and "12 texts: 12 embedded" in done.output, done.output
    url = bucket.put(tmp_path / "store", "stores/captions")
    local = TextEmbeddingStore(tmp_path / "store")
    assert torch.equal(TextEmbeddingStore(url).lookup(texts), local.lookup(texts))

    verified = run("--verify", url, source, *common)
    assert verified.exit_code == 0 and f"{url}: 12 texts in 1 sound shards, 12 embedded again" in verified.output
    again = run(source, *common, "--output", url)
    assert again.exit_code == 0 and "0 embedded, 12 in the store before" in again.output
    bucket.system.pipe_file(f"{bucket.url}/texts/2.txt", b"a new one\n")
    assert refused(source, *common, "--output", url) == (
        f"error: 1 of the texts are not in the text store {url}: 'a new one'. A store in an object store is only read: download it, "
        "add them by `proclip embed`, and upload it"
    )
    there_is_none = refused(source, *common, "--output", f"{bucket.url}/new")
    assert (
        f"there is nothing at {bucket.url}/new" in there_is_none and "only read: build it in a folder" in there_is_none
    )
    assert "there are no files at" in refused(f"{bucket.url}/*.csv", *common, "--output", tmp_path / "other")
    secret = refused(f"s3://me:{SECRET}@bucket/a.txt", *common, "--output", tmp_path / "other")
    assert "holds a user name, a password" in secret and SECRET not in secret
    assert not (tmp_path / "other").exists() and not (tmp_path / "s3:").exists()
