"""A stream's rows: once an epoch over all readers, in an order and with captions that can be had again, from any place."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.trainers.tiny_pairs import write_webdataset
from trainers.data import PairSource, open_pairs, pair_rows
from trainers.data.captions import draw_caption
from trainers.data.pair_rows import SkippedRows
from trainers.data.pair_stream import Part, Position, parts_of_reader
from trainers.data.stream_loader import StreamLoader


ROWS = 23


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """23 rows in shards of 7, 9 and 7; the picture of row 8 is broken."""
    folder = tmp_path_factory.mktemp("shards")
    write_webdataset(folder, [7, 9, 7], {8: b"broken"})
    return PairSource(
        source=str(folder),
        image_column="png",
        text_columns="json.captions",
        streaming=True,
        shuffle_buffer_size=4,
        max_broken_fraction=0.1,
    )


GOOD = [number for number in range(ROWS) if number != 8]


def collate(rows) -> list[tuple[int, str]]:
    """Which picture each row shows, and its caption."""
    return [(row["image"].getpixel((0, 0))[0], row["text"]) for row in rows]


def loader(source, batch_size=2, num_workers=0, seed=0, process=(0, 1)) -> StreamLoader:
    return StreamLoader(open_pairs(source, seed).for_process(*process), batch_size, collate, num_workers)


def take(loader, count):
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("num_readers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_shards", [1, 3, 5, 8])
def test_readers_share_the_shards(num_shards, num_readers):
    rows = Counter()
    shares = []
    for reader in range(num_readers):
        parts = parts_of_reader(num_shards, reader, num_readers, 0, 0)
        mine = [(part.shard, row) for part in parts for row in range(84) if row % part.step == part.offset]
        rows.update(mine)
        shares.append(len(mine))
        assert len(parts) <= num_shards // num_readers + 1, "nobody reads what it does not need"
    assert rows == Counter((shard, row) for shard in range(num_shards) for row in range(84))
    assert max(shares) - min(shares) <= 84
    assert parts_of_reader(2, 0, 1, 0, 0) in ([Part(0, 0, 1), Part(1, 0, 1)], [Part(1, 0, 1), Part(0, 0, 1)])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_row_once_an_epoch_over_processes_and_workers(source, num_processes, num_workers):
    seen = Counter()
    for process in range(num_processes):
        stream = open_pairs(source).for_process(process, num_processes)
        rows = torch.utils.data.DataLoader(
            stream, batch_size=None, num_workers=num_workers, collate_fn=lambda row: row
        )
        seen.update(number for number, _ in collate(list(rows)))
    assert seen == Counter(GOOD)


def test_epochs_follow_each_other_within_a_batch(source):
    rows = [
        row for batch in take(loader(source, batch_size=5), 9) for row in batch
    ]  # two epochs of 22 rows, and one row
    assert sorted(number for number, _ in rows[:22]) == sorted(number for number, _ in rows[22:44]) == GOOD
    assert [number for number, _ in rows[:22]] != [number for number, _ in rows[22:44]]


def test_the_order_depends_on_the_seed_alone(source):
    first = take(loader(source), 12)
    torch.manual_seed(7)
    assert take(loader(source), 12) == first
    assert take(loader(source, seed=1), 12) != first


@pytest.mark.parametrize("num_readers", [1, 2, 5])
def test_drawn_captions_do_not_depend_on_who_reads(source, num_readers):
    first, second = (dict(sum(take(loader(source), 22)[half : half + 11], [])) for half in (0, 11))
    assert {text.startswith("a longer") for text in first.values()} == {True, False}
    assert second.keys() == first.keys() and second != first
    stream = open_pairs(source)
    for epoch, expected in ((0, first), (1, second)):
        shown = {}
        for reader in range(num_readers):
            for row, key, _ in stream.read_epoch(Position(epoch), reader, num_readers, SkippedRows()):
                shown[row["image"].getpixel((0, 0))[0]] = draw_caption(row["text"], 0, epoch, key)
        assert shown == expected


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 5, 11, 17])
def test_resuming_goes_on_to_the_same_batches(source, num_workers, stop):
    process = (1, 2)
    whole = take(loader(source, 3, num_workers, process=process), 24)
    stopped = loader(source, 3, num_workers, process=process)
    assert take(stopped, stop) == whole[:stop]
    resumed = loader(source, 3, num_workers, process=process)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    random_state = torch.get_rng_state()
    assert take(resumed, 24 - stop) == whole[stop:]
    assert torch.equal(torch.get_rng_state(), random_state), "the model's random state is left alone"


def test_resuming_reads_and_decodes_nothing_twice(source, monkeypatch):
    """Only the shuffled block that was begun is read again, and none of its rows is decoded again."""
    stopped = loader(source)
    take(stopped, 8)
    decoded, real = [], pair_rows.decode_stored_image
    monkeypatch.setattr(pair_rows, "decode_stored_image", lambda *args: decoded.append(1) or real(*args))
    resumed = loader(source)
    resumed.load_state_dict(stopped.state_dict())
    take(resumed, 1)
    assert 2 <= len(decoded) <= 3  # one may be broken


def test_resuming_something_else_is_refused(source):
    state = loader(source, num_workers=0).state_dict()
    with pytest.raises(ValueError, match="has num_workers = 0, but now num_workers = 2"):
        loader(source, num_workers=2).load_state_dict(state)
    with pytest.raises(ValueError, match="has batch_size = 2, but now batch_size = 3"):
        loader(source, 3).load_state_dict(state)
    with pytest.raises(ValueError, match="has num_processes = 1, but now num_processes = 2"):
        loader(source, process=(0, 2)).load_state_dict(state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_rows_are_counted_over_workers_and_resuming(source, num_workers):
    state = loader(source, 1, num_workers)
    take(state, 30)
    before = state.skipped()
    assert before.broken_images >= 1 and before.rows == 30 + before.broken_images
    assert "001.tar, 00008: " in before.examples[0]
    resumed = loader(source, 1, num_workers)
    resumed.load_state_dict(state.state_dict())
    take(resumed, 30)
    assert resumed.skipped().rows == 60 + resumed.skipped().broken_images
    assert resumed.skipped().broken_images > before.broken_images


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_broken_rows_end_an_endless_stream(source, num_workers):
    with pytest.raises(ValueError, match="broken images .* max_broken_fraction = 0.0001 allows"):
        take(loader(replace(source, max_broken_fraction=1e-4), num_workers=num_workers), 100)


def test_a_reader_without_rows_says_so(tmp_path):
    write_webdataset(tmp_path, [2])
    source = PairSource(source=str(tmp_path), image_column="png", text_columns="json.captions", streaming=True)
    with pytest.raises(ValueError, match="reader 2 of 3 .* gets no good row in an epoch"):
        take(loader(source, process=(2, 3)), 1)


def test_memory_holds_a_block_and_no_shard(tmp_path, monkeypatch):
    """Of a shard of 400 rows, no more are read than the block that is shuffled and what `datasets` reads ahead."""
    write_webdataset(tmp_path, [400])
    source = PairSource(
        source=str(tmp_path), image_column="png", text_columns="json.captions", streaming=True, shuffle_buffer_size=20
    )
    stream = open_pairs(source)
    read, real = [], stream._next
    monkeypatch.setattr(stream, "_next", lambda *args: read.append(1) or real(*args))
    rows = iter(stream)
    for _ in range(20):
        next(rows)
    assert len(read) == 2  # of 16 rows each
    next(rows)
    assert len(read) == 3
