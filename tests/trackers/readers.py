"""What each tracker holds of a run, read from its own files: (step, values) in the order in which they were logged."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

Logged = list[tuple[int, dict[str, Any]]]


def wandb_records(file: Path) -> list[Any]:
    """The records of a .wandb file: a log in LevelDB's format (blocks of 32 kB; checksum, length, type, data) after
    seven bytes of header."""
    from wandb.proto import wandb_internal_pb2

    data, position, held, out = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        held += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            out.append(record)
            held = b""
    return out


def wandb_runs(folder: Path) -> list[list[Any]]:
    """The records of each session, the oldest first."""
    return [wandb_records(file) for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def from_wandb(folder: Path) -> Logged:
    out: Logged = []
    for records in wandb_runs(folder):
        for record in records:
            if record.WhichOneof("record_type") == "history":
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                out.append((record.history.step.num, values))
    return out


def from_tensorboard(folder: Path) -> Logged:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    out: Logged = []
    for tag in found.Tags()["scalars"]:
        out += [(event.step, {tag: event.value}) for event in found.Scalars(tag)]
    for tag in found.Tags()["tensors"]:
        for event in found.Tensors(tag):
            out.append((event.step, {tag.removesuffix("/text_summary"): event.tensor_proto.string_val[0].decode()}))
    return out


def from_trackio(home: Path, project: str) -> Logged:
    """Read in a process of its own: the library takes its folder from the environment when it is imported."""
    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "runs = S.get_runs(sys.argv[1])\n"
        "print(json.dumps([runs, [S.get_logs(sys.argv[1], run) for run in runs]]))"
    )
    env = {**os.environ, "TRACKIO_DIR": str(home)}
    done = subprocess.run([sys.executable, "-c", code, project], capture_output=True, text=True, env=env, check=True)
    runs, (logs,) = json.loads(done.stdout.splitlines()[-1])
    assert len(runs) == 1
    return [(line["step"], {key: line[key] for key in line if key not in ("step", "timestamp")}) for line in logs]


def pictures(to: str, folder: Path, home: Path) -> dict[str, tuple[int, int]]:
    """Name and size of the images that a tracker holds. `home`: where trackio keeps its files."""
    from PIL import Image

    if to == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
        return {tag: (it.width, it.height) for tag in found.Tags()["images"] for it in found.Images(tag)}
    files = (folder if to == "wandb" else home).rglob("*.png")
    return {str(file): Image.open(file).size for file in files}
