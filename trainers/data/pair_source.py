"""What a user says of rows to read: where they are, which of them, and how to read them."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainers.storage.object_stores import check_address


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Where images with captions are, and how to read them.

    Attributes:
        source: a folder, a file, a pattern of files (`shards/*.tar`), an address of one of these in an object store (`s3://bucket/shards/*.tar`;
            shards and tables), or the name of a dataset on the Hub. Of a folder or file are read:
            webdataset shards (.tar), tables (.parquet, .arrow, .csv, .tsv, .jsonl, .json), the captions files of COCO, Karpathy and Flickr30k, texts
            (.txt, one a line), folders of images with a metadata.jsonl, .csv or .parquet, or with a .txt, .caption or .json beside each image, and
            what `datasets` saved to disk.
        name: configuration of a dataset on the Hub.
        split: split of the dataset. A folder or file without splits is "train".
        revision: commit, tag or branch of a dataset on the Hub.
        data_files: files within a dataset on the Hub or a folder, as patterns.
        image_column: column of the image: an image of `datasets`, its bytes or its path. A list of columns: the first one that a row
            has, such as `["jpg", "png", "webp"]` for webdataset shards.
        text_columns: column or columns of the captions, each a string or a list of strings; all of a row's captions together are what one is
            drawn from. A dot reaches into an object: "json.caption". Images with a .txt beside them have the columns "image" and "text".
        teacher_text_columns: column or columns of what the teacher of stage 1 reads in place of the captions, such as the English ones of
            which these are translations. A row that has nothing there is read by the teacher too.
        image_folder: folder that the images lie in which rows name; by default that of the source. A row cannot name a file elsewhere.
        remote_images: whether a row may name an image by its address on the web (http, https). Each is fetched by one request whenever it is
            read, from whatever server the data names.
        streaming: False: rows by number, copied once into `datasets`' cache. True: rows as they come, read anew every epoch, for what is too
            large to copy.
        shuffle_buffer_size: rows of a stream that are shuffled together, and held in memory undecoded by every data worker. 1: the order of
            the files.
        max_broken_fraction: share of rows that may have a broken image, no caption or unreadable fields; more stops the reading with an error.

    Raises:
        ValueError: If a field has no sensible value; names it.
    """

    source: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | Sequence[str] | None = None
    image_column: str | Sequence[str] = "image"
    text_columns: str | Sequence[str] = "text"
    teacher_text_columns: str | Sequence[str] | None = None
    image_folder: str | None = None
    remote_images: bool = False
    streaming: bool = False
    shuffle_buffer_size: int = 1000
    max_broken_fraction: float = 0.01

    def __post_init__(self):
        check_address(self.source)
        for name in ("image_column", "text_columns", "teacher_text_columns"):
            columns = self.columns(name)
            if (not columns and getattr(self, name) is not None) or not all(
                isinstance(column, str) and column for column in columns
            ):
                raise ValueError(f"{name} must be a column's name or a list of names, got {getattr(self, name)!r}")
        if self.shuffle_buffer_size < 1:
            raise ValueError(f"shuffle_buffer_size must be at least 1, got {self.shuffle_buffer_size}")
        if not 0 <= self.max_broken_fraction <= 1:
            raise ValueError(f"max_broken_fraction must be between 0 and 1, got {self.max_broken_fraction}")

    def columns(self, field: str) -> list[str]:
        """The columns of `field`, such as "text_columns", as a list; empty if it is None."""
        value = getattr(self, field)
        if value is None:
            return []
        return [value] if isinstance(value, str) else list(value)
