"""Ulysses attention through the switch: ranks share sequences as they do with DeepSpeed itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from paceline.compat.accelerate.bridge import sections, sequences
from paceline.compat.accelerate.parallelism_config import ParallelismConfig
from paceline.compat.accelerate.settings.errors import InvalidValueError, UnsupportedError
from paceline.compat.accelerate.state import AcceleratorState
from tests.compat.test_accelerator import build, on_ranks
from tests.support.engines import needs_deepspeed

VOCABULARY = 32
LENGTH = 8


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, **sizes)
    return LlamaForCausalLM(config)


def rows(count: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    positions = torch.arange(LENGTH)
    return [{"input_ids": row, "labels": row, "position_ids": positions} for row in tokens]


def steps_of(model: Any, loader: Any, backward: Any, step: Any) -> list[float]:
    """Train on parts of sequences, and return the loss of each whole one."""
    losses = []
    for batch in loader:
        assert batch["input_ids"].shape == (1, LENGTH // 2)
        labels = batch.pop("shift_labels")
        logits = model(**batch).logits
        total = nn.functional.cross_entropy(logits[0].float(), labels[0], ignore_index=-100, reduction="sum")
        loss = total / (LENGTH - 1)
        backward(loss)
        step()
        whole = loss.detach().clone()
        torch.distributed.all_reduce(whole)
        losses.append(float(whole))
    return losses


def switched(stage: int, steps: int) -> tuple[list[float], list[float]]:
    accelerator = build(f"zero{stage}", parallelism_config=ParallelismConfig(sp_size=2))
    if stage == 2:
        # The attention of an earlier model is not divided a second time.
        earlier = llama()
        accelerator.prepare(earlier, torch.optim.SGD(earlier.parameters(), lr=0.5), DataLoader(rows(2), batch_size=1))
        accelerator.free_memory()
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(steps), batch_size=1))
    assert accelerator.deepspeed_config is not None
    assert accelerator.deepspeed_config["train_batch_size"] == 1

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    losses = steps_of(model, loader, accelerator.backward, step)
    norms = [float(value.float().norm()) for value in accelerator.get_state_dict(model).values()]
    check_the_next_run(stage)
    return losses, norms


def check_the_next_run(stage: int) -> None:
    """An engine of the same process whose ranks share nothing has whole sequences, and samples of its own."""
    AcceleratorState._reset_state(True)
    accelerator = build(f"zero{stage}")
    model = llama()
    model, _, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(rows(2), batch_size=1)
    )
    assert accelerator.deepspeed_config is not None
    assert accelerator.deepspeed_config["train_batch_size"] == 2
    [batch] = list(loader)
    with torch.no_grad():
        loss = model(**batch).loss
    row = rows(2)[accelerator.process_index]
    assert float(loss) == pytest.approx(float(llama()(**{k: v[None] for k, v in row.items()}).loss), rel=1e-5)


def plain(stage: int, steps: int) -> tuple[list[float], list[float]]:
    """The same with DeepSpeed's own functions."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    model = llama()
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    groups = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", 2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
    }
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=groups)[0]
    rank = torch.distributed.get_rank()
    loader = UlyssesSPDataLoaderAdapter(
        DataLoader(rows(steps)[rank::2], batch_size=1),
        groups.get_sequence_parallel_rank(),
        groups.get_sequence_parallel_group(),
        2,
        torch.device("cpu"),
    )
    losses = steps_of(engine, loader, engine.backward, engine.step)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        norms = [float(value.float().norm()) for value in model.state_dict().values()]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    groups._release_sequence_parallel_groups()
    deepspeed.utils.groups.mpu = None
    return losses, norms


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_that_share_sequences_train_as_with_deepspeed_itself(stage: int) -> None:
    expected = on_ranks(2, plain, stage, 4)[0]
    first, second = on_ranks(2, switched, stage, 4)
    assert first[0] == second[0] == pytest.approx(expected[0], rel=1e-5)
    assert first[1] == pytest.approx(expected[1], rel=1e-5)
    # The first loss is that of the whole sequence.
    row = {key: value[None] for key, value in rows(1)[0].items()}
    assert first[0][0] == pytest.approx(float(llama()(**row).loss.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("sizes", "strategy"), [({"sp_size": 2}, "ddp"), ({"sp_size": 2}, "fsdp"), ({"cp_size": 2}, "deepspeed")]
)
def test_sequences_that_cannot_be_divided_are_an_error(sizes: dict[str, Any], strategy: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{next(iter(sizes))} is 2"):
        sections.check_sequences(ParallelismConfig(**sizes), strategy)
    sections.check_sequences(ParallelismConfig(sp_size=2), "deepspeed")


def refused(model: Any, ranks: int = 2) -> str:
    sizes = ParallelismConfig(sp_size=2)
    with pytest.raises((InvalidValueError, UnsupportedError)) as caught:
        sequences.share_attention(model, sizes, ranks=ranks, micro_batch=1)
    return str(caught.value)


def test_models_whose_layers_need_the_whole_sequence_are_refused() -> None:
    assert "Linear has no attribute config" in refused(nn.Linear(1, 1))
    assert "with 3 ranks" in refused(llama(), ranks=3)
    for kind in ("linear_attention", "sliding_attention", "conv"):
        mixed: Any = SimpleNamespace(config=SimpleNamespace(layer_types=["full_attention", kind]))
        assert f"layers of the kind {kind}" in refused(mixed)
