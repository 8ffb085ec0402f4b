"""Tied parameters are known by where their values lie, for as long as they lie there."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from paceline.placement.tensors import TiedParameters, set_module_tensor_to_device, tied_copies


def test_a_tensor_that_comes_to_lie_where_a_tied_one_lay_is_not_tied() -> None:
    memory = np.zeros(4, dtype=np.float32)
    tied = TiedParameters()
    original = torch.from_numpy(memory)
    tied.note(original)
    copies = tied_copies(tied, original)
    assert copies == {}
    copies["cpu"] = torch.full((1, 4), 7.0)
    del original
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.from_numpy(memory).reshape(1, 4)
    set_module_tensor_to_device(layer, "weight", "cpu", tied_params_map=tied)
    assert layer.weight.tolist() == [[0.0, 0.0, 0.0, 0.0]]
    assert tied_copies(tied, layer.weight) is None


def test_a_copy_of_a_model_has_no_originals_of_the_first_one() -> None:
    tied = TiedParameters()
    original = torch.ones(4)
    tied.note(original)
    twin = copy.deepcopy({"one": tied, "other": tied})
    assert tied_copies(twin["one"], original) is None
    assert twin["one"] is twin["other"]
