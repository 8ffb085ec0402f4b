"""What machines compare before a launch, in words."""

from __future__ import annotations

from dataclasses import replace

from paceline.launch.rendezvous.machine_info import MachineInfo, mismatches

MACHINE = MachineInfo(
    token="1",
    host="a",
    address="10.0.0.1",
    machine_rank=0,
    num_machines="2",
    processes=2,
    versions={"torch": "2.13.0"},
    config={"mixed_precision": "no"},
    script=("train.py", "0123"),
)


def test_a_difference_names_both_machines() -> None:
    other = replace(MACHINE, token="2", host="b", config={"mixed_precision": "bf16"})
    assert mismatches([MACHINE, MACHINE]) == []
    assert mismatches([MACHINE, other]) == ["mixed_precision is no on a and bf16 on b"]


def test_machines_that_share_a_name_are_told_apart() -> None:
    other = replace(MACHINE, token="2", config={"mixed_precision": "bf16"}, script=("eval.py", "4567"))
    assert mismatches([MACHINE, other]) == [
        "mixed_precision is no on a (machine 0) and bf16 on a (machine 1)",
        "a (machine 0) runs train.py and a (machine 1) runs eval.py",
    ]
