"""Which modules become units of sharding, and which choices are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paceline.config import FullyShardedDataParallelPlugin
from paceline.errors import PrepareError, UnknownBlockError
from paceline.strategies.blocks import Units, find_units, repeated_blocks
from tests.support.models import Block, TinyTransformer


def find(model: nn.Module, **settings: object) -> Units:
    return find_units(model, FullyShardedDataParallelPlugin(**settings))  # type: ignore[arg-type]


class Encoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(8) for _ in range(layers))


class Pair(nn.Module):
    """Two stacks of blocks side by side, and a class of its own around each."""

    def __init__(self) -> None:
        super().__init__()
        self.left = Encoder(2)
        self.right = Encoder(3)
        self.head = nn.Linear(8, 8)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Block(4) for _ in range(2))


class Nested(nn.Module):
    """Blocks within blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ModuleList(Outer() for _ in range(2))


def test_repeated_blocks_are_found() -> None:
    units = find(TinyTransformer(layers=3))
    assert units.names == ("blocks.2", "blocks.1", "blocks.0")
    assert units.classes == (("Block", 3),)
    assert str(units) == "4 units: 3 Block + the rest (repeated blocks)"


def test_repeated_blocks_are_found_in_every_stack() -> None:
    assert set(find(Pair()).names) == {
        *(f"left.layers.{n}" for n in range(2)),
        *(f"right.layers.{n}" for n in range(3)),
    }


def test_of_nested_stacks_the_outer_one_is_taken() -> None:
    assert set(find(Nested()).names) == {"outer.0", "outer.1"}


def test_repeated_blocks_in_a_sequential() -> None:
    model = nn.Sequential(nn.Linear(8, 8), *(Block(8) for _ in range(3)), nn.LayerNorm(8))
    assert set(find(model).names) == {"1", "2", "3"}


def test_layers_and_blocks_without_parameters_are_no_units() -> None:
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    assert find(layers).names == ()
    empty = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Flatten()) for _ in range(5))
    assert find(nn.ModuleDict({"a": empty, "b": nn.Linear(2, 2)})).names == ()
    assert str(find(layers)) == "1 unit: the whole model (no repeated blocks)"


def test_classes_that_were_named() -> None:
    units = find(Nested(), transformer_cls_names_to_wrap="Outer,Block")
    assert dict(units.classes) == {"Outer": 2, "Block": 4}
    place = {name: index for index, name in enumerate(units.names)}
    for name in place:
        inside = [other for other in place if other.startswith(f"{name}.")]
        assert all(place[other] < place[name] for other in inside), "inner units come first"


def test_the_models_own_hint_comes_before_structure() -> None:
    model = Nested()
    model._no_split_modules = ["Block", "AClassOfAnotherModel"]  # type: ignore[assignment]
    units = find(model)
    assert units.classes == (("Block", 4),)
    assert "_no_split_modules" in units.how
    named = find(model, transformer_cls_names_to_wrap=["Outer"])
    assert named.classes == (("Outer", 2),), "what the user says comes before that"


def test_a_hint_that_fits_nothing_is_left_alone() -> None:
    model = TinyTransformer(layers=2)
    model._no_split_modules = ["AClassOfAnotherModel"]  # type: ignore[assignment]
    assert find(model).how == "repeated blocks"


def test_an_unknown_class_lists_the_others() -> None:
    with pytest.raises(UnknownBlockError) as error:
        find(TinyTransformer(), transformer_cls_names_to_wrap=["Block", "Blok", "LlamaDecoderLayer"])
    assert error.value.requested == ("Blok", "LlamaDecoderLayer")
    assert error.value.candidates[0] == "Block", "the largest first"
    assert {"Linear", "Embedding", "LayerNorm"} <= set(error.value.candidates)
    assert not {"ModuleList", "TinyTransformer"} & set(error.value.candidates)
    assert "Did you mean Block?" in str(error.value)
    assert str(error.value).endswith("Remove the setting, and paceline finds the blocks itself (Block).")


def test_an_unknown_class_of_a_model_without_blocks() -> None:
    with pytest.raises(UnknownBlockError) as error:
        find(flat(10), transformer_cls_names_to_wrap=["Block"])
    assert "Remove the setting" not in str(error.value), "nothing would be found"


def test_wrapping_by_class_needs_a_class_or_one_that_can_be_found() -> None:
    assert find(TinyTransformer(layers=2), auto_wrap_policy="TRANSFORMER_BASED_WRAP").names
    with pytest.raises(PrepareError, match="TRANSFORMER_BASED_WRAP, and Sequential has no class to wrap") as error:
        find(flat(10**6), auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    assert "(Linear)" in str(error.value)


def test_by_size() -> None:
    model = nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(4)), nn.Linear(10, 1))
    model = nn.Sequential(model, nn.Linear(10, 20))
    at_most = find(model, auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=100)
    assert set(at_most.names) == {"1", "0.0", "0.1", "0.2", "0.3"}
    assert "at least 100 parameters each" in str(at_most)
    larger = find(model, auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=101)
    assert set(larger.names) == {"0", "1"}, "0 holds 411 together"
    assert find(model, auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=10**6).names == ()


def test_by_size_never_cuts_a_tie() -> None:
    model = TinyTransformer(width=16, layers=2)
    units = find(model, auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=500)
    assert "tokens" not in units.names
    assert "head" not in units.names
    assert units.names


def test_no_wrapping() -> None:
    units = find(TinyTransformer(), auto_wrap_policy="NO_WRAP")
    assert (units.names, units.how) == ((), "NO_WRAP")


def flat(bytes_: int) -> nn.Module:
    """A model without blocks, of so many bytes in fp32, that takes no memory."""
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(bytes_ // 8, 1, bias=False), nn.Linear(bytes_ // 8, 1, bias=False))


def test_a_big_model_in_one_unit_is_refused() -> None:
    assert find(flat(10**9)).names == ()
    with pytest.raises(PrepareError, match=r"2\.0 GB of parameters and no block") as error:
        find(flat(2 * 10**9))
    assert "fsdp_transformer_layer_cls_to_wrap" in str(error.value)
    assert "Linear" in str(error.value)
    with pytest.raises(PrepareError):
        find(flat(10**9 + 8))
    with pytest.raises(PrepareError, match="at least 10,000,000,000 parameters"):
        find(flat(2 * 10**9), auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=10**10)


def test_one_unit_is_right_when_it_was_asked_for() -> None:
    assert find(flat(4 * 10**9), auto_wrap_policy="NO_WRAP").names == ()


def test_a_big_model_without_blocks_is_refused_for_sharding_only() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(20_000, 20_000))
        several = nn.ModuleList(nn.Sequential(nn.Linear(10_000, 10_000)) for _ in range(3))
    with pytest.raises(PrepareError, match="no block to shard on its own"):
        find_units(model, FullyShardedDataParallelPlugin())
    assert repeated_blocks(model) == []
    assert repeated_blocks(several) == ["2", "1", "0"]
