"""What is said when memory ran out: whose it is, from a recorded snapshot, and what would help, by arithmetic."""

from __future__ import annotations

import torch
from torch import nn

from paceline.planner import (
    MemoryUsage,
    RunSettings,
    describe_out_of_memory,
    find_remedies,
    measure_memory,
    requested_bytes,
)
from paceline.planner.memory_usage import Storages, unnamed_blocks

GIB = 2**30
# As 80 GB devices under DDP see it: 8 GiB of parameters in fp32 with Adam, batches of 8.
FULL = MemoryUsage(
    parameters=8 * GIB, gradients=8 * GIB, optimizer=16 * GIB, other=46 * GIB, free=1 * GIB, total=79 * GIB,
    largest=((4 * GIB, "an activation or a buffer"),),
)  # fmt: skip


def test_what_was_asked_for_is_read_from_what_torch_says() -> None:
    cuda = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB"
    cpu = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"
    assert requested_bytes(cuda) == int(2.5 * GIB)
    assert requested_bytes(cpu) == 4096
    assert requested_bytes("") is None


def test_the_smallest_change_that_is_enough_comes_last_of_those_told() -> None:
    found = find_remedies(FULL, RunSettings(ranks=4, micro_batch=8, accumulation=2), 3 * GIB)
    assert found == [
        "batches of 4 with gradient_accumulation_steps=4, the same optimizer steps: frees about 23.00 GiB, "
        "which is enough"
    ]
    more = find_remedies(FULL, RunSettings(ranks=4, micro_batch=2, accumulation=1), 26 * GIB)
    assert more[0].startswith("batches of 1 with gradient_accumulation_steps=2")
    assert "enough" not in more[0]
    assert "activation_checkpointing" in more[1]
    assert more[2] == "--use_fsdp: state sharded over 4: frees about 24.00 GiB"
    assert more[3].endswith("frees about 32.00 GiB, which is enough")
    short = find_remedies(FULL, RunSettings(ranks=1, micro_batch=1, checkpoints=True, offloads=True), 90 * GIB)
    assert short[-1] == "none of these is enough by itself: 89.00 GiB are missing"


def test_memory_in_pieces_is_told_from_memory_in_use() -> None:
    pieces = MemoryUsage(other=60 * GIB, unused=10 * GIB, free=1 * GIB, total=79 * GIB)
    found = find_remedies(pieces, RunSettings(micro_batch=2), 4 * GIB)
    assert found[0].startswith(
        "the variable PYTORCH_ALLOC_CONF=expandable_segments:True may be enough: 10.00 GiB are reserved"
    )
    assert found[1].startswith("batches of 1 with gradient_accumulation_steps=2"), "a guess does not end the list"


def test_a_limit_below_what_is_free_counts() -> None:
    limited = MemoryUsage(other=6 * GIB, free=70 * GIB, total=79 * GIB)
    first, *_ = find_remedies(limited, RunSettings(micro_batch=8), 4 * GIB)
    assert first.endswith("frees about 3.00 GiB"), "not enough, whatever others may have"


def test_the_report_says_whose_it_is() -> None:
    text = describe_out_of_memory(FULL, RunSettings(micro_batch=8), 3 * GIB, rank=2, device="H100 (cuda:2)")
    lines = text.splitlines()
    assert lines[0] == (
        "memory of rank 2 on H100 (cuda:2): 78.00 GiB in use, 1.00 GiB of 79.00 GiB free, and 3.00 GiB more "
        "were requested"
    )
    assert (
        lines[1]
        == "  parameters 8.00 GiB, gradients 8.00 GiB, optimizer state 16.00 GiB, activations and all else 46.00 GiB"
    )
    assert lines[3] == "  4.00 GiB  an activation or a buffer"


def test_a_model_is_weighed_by_owner() -> None:
    model = nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 256)).sum().backward()
    optimizer.step()
    usage = measure_memory([model, model], [optimizer], torch.device("cpu"))
    weights = (256 * 256 + 256) * 4
    assert usage.parameters == weights
    assert usage.gradients == weights
    assert 2 * weights <= usage.optimizer <= 2 * weights + 64
    assert usage.other > 0
    assert not usage.is_sharded
    assert usage.largest[0][1] in ("weight (parameter)", "gradient of weight") or "optimizer" in usage.largest[0][1]


def test_what_nobody_known_holds_comes_from_the_allocators_snapshot() -> None:
    snapshot = [
        {
            "device": 0,
            "address": 1000,
            "blocks": [
                {"size": 100, "state": "active_allocated"},
                {"size": 50, "state": "inactive"},
                {
                    "size": 300,
                    "state": "active_allocated",
                    "frames": [
                        {"filename": "/x/site-packages/torch/nn.py", "line": 3},
                        {"filename": "/home/me/model.py", "line": 41},
                    ],
                },
            ],
        },
        {"device": 1, "address": 1, "blocks": [{"size": 9, "state": "active_allocated"}]},
    ]
    held = Storages({1000: 100}, {1000: "weight (parameter)"})
    assert list(unnamed_blocks(held, snapshot, 0)) == [
        (300, "an activation or a buffer, allocated at /home/me/model.py:41")
    ]
