"""An index as one parquet file, which vector databases load."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trainers.storage.files import replacing

from .table import ImageIndex


COLUMNS = ["path", "checksum", "size", "width", "height", "taken", "caption", "embedding"]
_ROWS_OF_A_GROUP = 8192


def export_index(index: ImageIndex, path: Path) -> None:
    """Writes the images of `index`, without thumbnails, to the parquet file `path`; the memory is that of a few thousand rows.

    Embeddings are written as they are stored. The file's metadata says how to read int8 and binary ones (`quantization`: precision, dim and ranges).
    """
    schema = pa.schema([index.images.schema.field(name) for name in COLUMNS])
    if index.precision != "float32":
        schema = schema.with_metadata({"quantization": json.dumps(index.quantization.to_dict())})
    batches = index.images.search().select(COLUMNS).limit(None).to_batches(batch_size=_ROWS_OF_A_GROUP)
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch.select(COLUMNS).replace_schema_metadata(schema.metadata))
