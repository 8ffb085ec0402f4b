"""Models of transformers read the position ids that a script passes, and not those that they make themselves."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline import Accelerator
from paceline.strategies import own_positions

if TYPE_CHECKING:
    from collections.abc import Iterator

transformers = pytest.importorskip("transformers")
masking = pytest.importorskip("transformers.masking_utils")


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The position ids that transformers has looked at."""
    looked_at: list[torch.Tensor] = []
    find = masking.find_packed_sequence_indices

    def search(position_ids: torch.Tensor) -> Any:
        looked_at.append(position_ids)
        return find(position_ids)

    monkeypatch.setattr(masking, "find_packed_sequence_indices", search)
    monkeypatch.setattr(own_positions, "_CONSECUTIVE", set())
    yield looked_at
    assert not own_positions._FORWARDS.stack


def make_model(kind: Any = None) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    kind = kind or transformers.LlamaForCausalLM
    return kind(transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False))


def make_batch() -> torch.Tensor:
    return torch.arange(16).reshape(2, 8)


@pytest.mark.parametrize("evaluation", [False, True])
def test_own_ids_are_read_once(searched: list[torch.Tensor], evaluation: bool) -> None:
    expected = make_model()(input_ids=make_batch()).logits
    model = Accelerator(cpu=True).prepare_model(make_model(), evaluation_mode=evaluation)
    before = len(searched)
    for _ in range(4):
        assert torch.equal(model(input_ids=make_batch()).logits, expected)
    assert len(searched) == before + 1


@pytest.mark.parametrize("by_name", [True, False])
def test_packed_ids_are_read_in_every_forward(searched: list[torch.Tensor], by_name: bool) -> None:
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    plain, model = make_model(), Accelerator(cpu=True).prepare(make_model())
    alone = torch.cat([plain(input_ids=make_batch()[:, :4]).logits, plain(input_ids=make_batch()[:, 4:]).logits], 1)
    model(input_ids=make_batch())
    before = len(searched)
    for _ in range(3):
        if by_name:
            logits = model(input_ids=make_batch(), position_ids=packed.expand(2, -1)).logits
        else:
            logits = model(make_batch(), None, packed.expand(2, -1)).logits
        torch.testing.assert_close(logits, alone)
    assert len(searched) == before + 3
    # And not in the forward after that.
    model(input_ids=make_batch())
    assert len(searched) == before + 3


def test_a_model_inside_gets_the_ids_of_the_one_around_it(searched: list[torch.Tensor]) -> None:
    class Numbering(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        """Makes ids itself, of two samples in each row."""

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.model(input_ids=input_ids, position_ids=torch.arange(4).repeat(2)[None]).last_hidden_state

    model: Any = Accelerator(cpu=True).prepare(make_model(Numbering))
    plain = make_model(Numbering)
    for _ in range(3):
        assert torch.equal(model(input_ids=make_batch()), plain(input_ids=make_batch()))


def test_ids_of_other_authors_are_read(searched: list[torch.Tensor]) -> None:
    class Restarting(transformers.LlamaModel):  # type: ignore[misc, name-defined]
        """Numbers each half of a row from 0 once it is told to."""

        halves = 1

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **options: Any) -> Any:
            if position_ids is None:
                length = input_ids.shape[1] // self.halves
                position_ids = torch.arange(length).repeat(self.halves)[None]
            return super().forward(input_ids=input_ids, position_ids=position_ids, **options)

    plain: Any = make_model(Restarting)
    model: Any = Accelerator(cpu=True).prepare(copy.deepcopy(plain))
    for halves in (1, 2):
        plain.halves = model.halves = halves
        expected = plain(input_ids=make_batch()).last_hidden_state
        assert torch.equal(model(input_ids=make_batch()).last_hidden_state, expected)


def test_an_error_in_a_forward_leaves_nothing_behind(searched: list[torch.Tensor]) -> None:
    model: Any = Accelerator(cpu=True).prepare(make_model())
    with pytest.raises(IndexError):
        model(input_ids=make_batch() + 1000)
    model(input_ids=make_batch())
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]).expand(2, -1)
    before = len(searched)
    model(input_ids=make_batch(), position_ids=packed)
    assert len(searched) == before + 1


def test_prepared_and_copied_again(searched: list[torch.Tensor]) -> None:
    model = make_model()
    for _ in range(2):
        model = Accelerator(cpu=True).prepare(model)
    hooks = [hook for hook in model.model._forward_pre_hooks.values() if isinstance(hook, own_positions._Enter)]
    assert len(hooks) == 1
    copied = copy.deepcopy(model)
    copied(input_ids=make_batch())
    before = len(searched)
    copied(input_ids=make_batch())
    assert len(searched) == before


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_ids_put_in_on_the_way_are_read(searched: list[torch.Tensor], how: str) -> None:
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    model: Any = Accelerator(cpu=True).prepare(make_model())
    model(input_ids=make_batch())
    expected = model(input_ids=make_batch(), position_ids=packed).logits
    inner, forward = model.model, model.model.forward
    if how == "hook":
        inner.register_forward_pre_hook(lambda _, a, k: (a, {**k, "position_ids": packed}), with_kwargs=True)
    else:
        inner.forward = lambda *a, **k: forward(*a, **{**k, "position_ids": packed})
    assert torch.equal(model(input_ids=make_batch()).logits, expected)


def test_an_interrupt_leaves_nothing_for_the_next_forward(searched: list[torch.Tensor]) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model: Any = Accelerator(cpu=True).prepare(make_model())
    handle = model.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=make_batch())
    handle.remove()
    model(input_ids=make_batch())
