"""`paceline checkpoint ...` and `paceline merge-weights`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from paceline.checkpoint.foreign import open_foreign
from paceline.checkpoint.foreign.writers import WRITERS
from tests.unit.checkpoint.test_foreign import DECAY, NO_DECAY, RECORDED

if TYPE_CHECKING:
    from tests.unit.cli.conftest import Paceline


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with two numbered checkpoints, of which the newer lost a file."""
    state = open_foreign(RECORDED / "accelerate", [NO_DECAY + DECAY])
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for number in (0, 1):
        WRITERS["paceline"](state, folder / f"checkpoint_{number}", lambda _: None)
    (folder / "checkpoint_1" / "optimizer.safetensors").unlink()
    return tmp_path / "run"


def test_the_help_teaches_without_torch() -> None:
    program = (
        "import sys; from paceline.cli import main; sys.argv = ['paceline', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    for words in (["checkpoint", "--help"], ["checkpoint", "convert", "-h"], ["merge-weights", "--help"]):
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
        assert "Usage" in done.stdout


def test_list_shows_what_is_complete_and_why_not(paceline: Paceline, project: Path) -> None:
    answer = paceline("checkpoint", "list", str(project))
    assert answer.code == 0
    rows = [line for line in answer.lines if line.strip().startswith("checkpoints/")]
    assert "checkpoint_1" in rows[0]
    assert "incomplete" in rows[0]
    assert "checkpoint_0" in rows[1]
    assert "complete" in rows[1]
    assert "optimizer.safetensors is missing" in answer.out
    found = json.loads(paceline("checkpoint", "list", str(project), "--json").out)
    assert [row["state"] for row in found] == ["incomplete", "complete"]
    assert found[1]["step"] == 3


def test_list_names_folders_of_other_libraries(paceline: Paceline) -> None:
    found = json.loads(paceline("checkpoint", "list", str(RECORDED), "--json").out)
    assert {"deepspeed", "accelerate", "dcp"} == {row["format"] for row in found}


def test_list_says_what_samples_are(paceline: Paceline, project: Path) -> None:
    answer = paceline("checkpoint", "list", str(project))
    assert "samples of the epoch" in answer.out
    assert re.search(r"^checkpoints/checkpoint_1: 1 of \d+ files: optimizer.safetensors is missing", answer.out, re.M)


def test_list_shows_the_newest_of_transformers_first(paceline: Paceline, tmp_path: Path) -> None:
    for number in (5, 10, 100):
        shutil.copytree(RECORDED / "accelerate", tmp_path / f"checkpoint-{number}")
    found = json.loads(paceline("checkpoint", "list", str(tmp_path), "--json").out)
    assert [row["name"] for row in found] == ["checkpoint-100", "checkpoint-10", "checkpoint-5"]


def test_list_of_nothing(paceline: Paceline, tmp_path: Path) -> None:
    assert "There is no checkpoint" in paceline("checkpoint", "list", str(tmp_path)).out


def test_inspect_shows_facts_and_tensors(paceline: Paceline, project: Path) -> None:
    complete = str(project / "checkpoints" / "checkpoint_0")
    answer = paceline("checkpoint", "inspect", complete, "--tensors")
    assert answer.code == 0
    assert "234 elements in 11 tensors" in answer.out
    assert any("optimizer/gain/exp_avg_sq" in line and "[1]" in line for line in answer.lines)
    found = json.loads(paceline("checkpoint", "inspect", complete, "--json").out)
    assert found["step"] == 3


def test_inspect_of_another_library_says_what_is_left(paceline: Paceline) -> None:
    answer = paceline("checkpoint", "inspect", str(RECORDED / "accelerate"))
    assert answer.code == 0
    assert "skipped: optimizer.bin" in answer.out


def test_verify_ends_with_one_if_any_is_damaged(paceline: Paceline, project: Path) -> None:
    good, bad = (str(project / "checkpoints" / f"checkpoint_{number}") for number in (0, 1))
    answer = paceline("checkpoint", "verify", good, str(RECORDED / "deepspeed_3"))
    assert answer.code == 0
    assert answer.out.count("complete ") == 2
    answer = paceline("checkpoint", "verify", good, bad)
    assert answer.code == 1
    assert re.fullmatch(rf"DAMAGED   {bad}: 1 of \d+ files: optimizer.safetensors is missing\.", answer.lines[-1])
    assert answer.out.count(bad) == 1


def test_verify_finds_a_flipped_byte(paceline: Paceline, project: Path) -> None:
    path = project / "checkpoints" / "checkpoint_0" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    answer = paceline("checkpoint", "verify", str(path.parent))
    assert answer.code == 1
    assert "damaged" in answer.out


def test_export_writes_shards_in_another_dtype(paceline: Paceline, project: Path, tmp_path: Path) -> None:
    complete = str(project / "checkpoints" / "checkpoint_0")
    answer = paceline("checkpoint", "export", complete, "out", "--max_shard_size", "300B", "--dtype", "bf16")
    assert answer.code == 0, answer.err
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / "out" / name) for name in set(index["weight_map"].values())}
    assert len(files) > 1
    expected = load_file(RECORDED / "accelerate" / "model.safetensors")
    assert set(index["weight_map"]) == set(expected)
    for name, file in index["weight_map"].items():
        assert torch.equal(files[file][name], expected[name].bfloat16()), name
    answer = paceline("checkpoint", "export", complete, "out")
    assert answer.code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_merge_weights_reads_folders_of_dcp(paceline: Paceline, tmp_path: Path) -> None:
    answer = paceline("merge-weights", str(RECORDED / "accelerate_fsdp" / "pytorch_model_fsdp_0"), "out")
    assert answer.code == 0
    expected = load_file(RECORDED / "accelerate_fsdp" / "expected.safetensors")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, expected[f"model/{name}"]), name


def test_convert_says_what_it_left(paceline: Paceline, tmp_path: Path) -> None:
    answer = paceline("checkpoint", "convert", str(RECORDED / "accelerate"), "out", "--to", "paceline")
    assert answer.code == 0
    assert "note: skipped: optimizer.bin" in answer.out
    answer = paceline("checkpoint", "convert", str(RECORDED / "accelerate"), "out", "--to", "fsdp")
    assert answer.code == 2
    assert "out is not empty" in answer.err
    (tmp_path / "names.txt").write_text("\n".join(NO_DECAY + DECAY))
    answer = paceline(
        "checkpoint", "convert", str(RECORDED / "accelerate"), "more", "--to", "fsdp", "--parameters", "names.txt"
    )
    assert answer.code == 0
    assert "1 optimizer" in answer.out
    assert len(open_foreign(tmp_path / "more").optimizers[0].slots) == 9


def test_a_folder_that_is_nothing_is_an_error(paceline: Paceline, tmp_path: Path) -> None:
    answer = paceline("checkpoint", "inspect", str(tmp_path))
    assert answer.code == 1
    assert "not a checkpoint of a known format" in answer.err


def test_a_checkpoint_is_not_written_over(paceline: Paceline, project: Path) -> None:
    complete = project / "checkpoints" / "checkpoint_0"
    answer = paceline("checkpoint", "export", str(complete), str(complete), "--dtype", "bf16")
    assert answer.code == 2
    assert f"{complete} holds a checkpoint" in answer.err
    assert paceline("checkpoint", "verify", str(complete)).code == 0


def test_folders_around_and_within_are_told_apart(paceline: Paceline, project: Path) -> None:
    complete = project / "checkpoints" / "checkpoint_0"
    assert (
        f"it is a checkpoint itself: paceline checkpoint inspect {complete}"
        in paceline("checkpoint", "list", str(complete)).out
    )
    for words in (["inspect"], ["verify"]):
        answer = paceline("checkpoint", *words, str(project))
        assert answer.code == 1
        assert "name one of them, such as" in answer.out + answer.err


def test_numbered_folders_of_other_libraries_are_listed_as_theirs(paceline: Paceline, tmp_path: Path) -> None:
    shutil.copytree(RECORDED / "accelerate", tmp_path / "checkpoints" / "checkpoint_4")
    found = json.loads(paceline("checkpoint", "list", str(tmp_path), "--json").out)
    assert [(row["name"], row["format"], row["state"]) for row in found] == [
        ("checkpoints/checkpoint_4", "accelerate", "")
    ]


def test_merge_weights_takes_the_flags_of_accelerate(paceline: Paceline, project: Path, tmp_path: Path) -> None:
    complete = project / "checkpoints" / "checkpoint_0"
    answer = paceline("merge-weights", str(complete), str(tmp_path / "out"), "--unsafe_serialization")
    assert answer.code == 2
    assert "Pickled weights run code" in answer.err
    answer = paceline("merge-weights", "--remove_checkpoint_dir", str(complete), str(complete / "out"))
    assert answer.code == 2
    assert complete.exists()
    assert paceline("merge-weights", "--remove_checkpoint_dir", str(complete), str(tmp_path / "out")).code == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not complete.exists()


def test_folders_behind_links_and_in_the_home(
    paceline: Paceline, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    (home / "run").symlink_to(project)
    (home / "latest").symlink_to("run/checkpoints/checkpoint_0")
    (project / "checkpoints" / "checkpoint_5").symlink_to("gone")
    found = json.loads(paceline("checkpoint", "list", "~/run", "--json").out)
    assert [row["state"] for row in found] == ["incomplete", "incomplete", "complete"]
    assert "checkpoint_5 is a link to it" in found[0]["problem"]
    assert paceline("checkpoint", "inspect", "~/latest").code == 0
    assert paceline("checkpoint", "verify", "~/latest").code == 0
    assert paceline("checkpoint", "export", "~/latest", "~/weights").code == 0
    assert (home / "weights" / "model.safetensors").is_file()
    assert paceline("checkpoint", "convert", "~/latest", "~/converted", "--to", "accelerate").code == 0
    assert (home / "converted").is_dir()
    assert paceline("merge-weights", "~/latest", "~/merged", "--remove-checkpoint-dir").code == 0
    assert not (home / "latest").is_symlink()
    assert not (project / "checkpoints" / "checkpoint_0").exists()
    assert not Path("~").exists()
