"""Checksums of whole files from those of their pieces, as anybody computes them; and those that older formats had."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from paceline.checkpoint import open_checkpoint
from paceline.checkpoint.format.checksums import Span, combine, of_spans
from paceline.errors import DamagedCheckpointError
from tests.unit.checkpoint.test_checkpoints import Run, flip_in

FORMAT_1 = Path(__file__).with_name("format_1")


def test_checksums_of_two_ranges_combine() -> None:
    draw = random.Random(3)
    for length in [0, 1, 2, 31, 32, 1000, 70_001]:
        data = draw.randbytes(length)
        for cut in {0, length // 3, length}:
            assert combine(zlib.crc32(data[:cut]), zlib.crc32(data[cut:]), length - cut) == zlib.crc32(data)
    assert combine(zlib.crc32(b"a"), zlib.crc32(b"b"), 1) != zlib.crc32(b"ba"), "the order counts"


def test_what_no_piece_covers_is_zeros() -> None:
    data = bytes(5) + b"first" + bytes(70_000) + b"second" + bytes(3)
    spans = [Span(70_010, 70_016, zlib.crc32(b"second")), Span(5, 10, zlib.crc32(b"first"))]
    assert of_spans(len(data), spans) == zlib.crc32(data)
    assert of_spans(9, []) == zlib.crc32(bytes(9))
    with pytest.raises(ValueError, match="bytes 3 to 9 come after byte 4 of 10"):
        of_spans(10, [Span(3, 9, 1), Span(0, 4, 1)])
    with pytest.raises(ValueError, match="bytes 3 to 11 come after byte 0 of 10"):
        of_spans(10, [Span(3, 11, 1)])


def test_a_checkpoint_of_format_1_is_loaded_and_verified(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(FORMAT_1, folder)
    checkpoint = open_checkpoint(folder)
    # Format 1 has a checksum of the header only; that of the file is computed.
    record = json.loads((folder / "manifest.json").read_text())["files"]["model.safetensors"]
    assert record["checked"] < record["size"]
    for name, record in checkpoint.manifest.files.items():
        assert record.crc32 == zlib.crc32((folder / name).read_bytes())
    progress: list[int] = []
    checkpoint.verify(progress.append)
    assert sum(progress) == sum(record.size for record in checkpoint.manifest.files.values())
    run = Run(tmp_path / "run")
    run.accelerator.load_state(folder)
    assert torch.equal(run.model[0].weight, checkpoint.read("model/0.weight"))
    assert run.optimizer.state[run.model[0].weight]["step"] == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_flipped_byte_in_format_1_is_found(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(FORMAT_1, folder)
    for where in (9, -1):
        flip_in(name, where)(folder)
        with pytest.raises(DamagedCheckpointError, match="damaged"):
            open_checkpoint(folder).verify()
        flip_in(name, where)(folder)


def test_a_manifest_whose_checksums_contradict_each_other_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(FORMAT_1, folder)
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document["files"]["model.safetensors"]["checked"] = 300
    path.write_text(json.dumps(document))
    with pytest.raises(DamagedCheckpointError, match="bytes 288 to 312 come after byte 300 of 372"):
        open_checkpoint(folder)
