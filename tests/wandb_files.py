"""What lies in the files that Weights & Biases writes offline."""

import json
import struct
from pathlib import Path


def wandb_records(path: Path) -> list:
    """The protobuf messages of a .wandb file, which has LevelDB's log format. Blocks of 32 KiB hold pieces. Each piece
    has a header of checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto import wandb_internal_pb2

    contents, records, message = path.read_bytes(), [], b""
    position = 7  # the file's own header
    while position + 7 <= len(contents):
        if 32768 - position % 32768 < 7:  # the rest of the block is too short for a header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", contents[position : position + 7])
        message += contents[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(message))
            message = b""
    return records


def wandb_history(records: list) -> list[dict]:
    """The rows that were logged, in their order. Each has a "_step"."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows
