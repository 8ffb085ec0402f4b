from __future__ import annotations

import dataclasses
import json
import socket
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from paceline.config import Origin, Resolved, RunConfig, with_arguments
from paceline.errors import ConfigError, UsageError
from paceline.launch import Command, LaunchPlan, detect, plan, planning
from tests.support.ranks import free_port


def resolved(**values: Any) -> Resolved:
    return Resolved(RunConfig(**values), {key: Origin("flag", f"--{key}") for key in values})


@pytest.fixture
def script(tmp_path: Path) -> Command:
    path = tmp_path / "train.py"
    path.write_text("")
    return Command(str(path), ("--lr", "0.1 x"))


@pytest.fixture
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "count_accelerators", lambda: ("cuda", 4))


@pytest.fixture
def no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "count_accelerators", lambda: (None, 0))


def test_each_rank_has_its_command_and_variables(script: Command, no_devices: None) -> None:
    settings = resolved(num_processes=2, num_cpu_threads_per_process=3)
    planned = plan(settings, script, {})
    assert [r.variables for r in planned.ranks] == [
        {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"},
        {"RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"},
    ]
    assert {r.command for r in planned.ranks} == {
        (sys.executable, "-m", "paceline.launch.worker", script.script, "--lr", "0.1 x")
    }
    assert (planned.variables["WORLD_SIZE"], planned.variables["OMP_NUM_THREADS"]) == ("2", "3")
    assert Resolved.from_json(planned.variables["PACELINE_CONFIG"]) == settings


def test_only_variables_that_differ_are_listed(script: Command, no_devices: None) -> None:
    env = {"OMP_NUM_THREADS": "7", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    planned = plan(resolved(num_processes=1), script, env)
    assert not {"OMP_NUM_THREADS", "WORLD_SIZE", "MASTER_ADDR"} & set(planned.variables)
    assert "MASTER_PORT" not in planned.variables


def test_the_cores_are_shared_out(script: Command, no_devices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "core_count", lambda: 8)
    assert plan(resolved(num_processes=3), script, {}).variables["OMP_NUM_THREADS"] == "2"
    assert plan(resolved(num_processes=16), script, {}).variables["OMP_NUM_THREADS"] == "1"


def test_text_and_dict(script: Command, no_devices: None) -> None:
    port = free_port()
    planned = plan(resolved(num_processes=2, main_process_port=port), script, {})
    text = str(planned)
    assert text.startswith(f"2 processes on this machine, meeting at 127.0.0.1, port {port}\n")
    assert f"RANK=1 LOCAL_RANK=1 GROUP_RANK=0 {sys.executable} -m paceline.launch.worker" in text
    assert "--lr '0.1 x'" in text
    data: dict[str, Any] = json.loads(json.dumps(planned.as_dict()))
    assert (data["port"], len(data["ranks"])) == (port, 2)
    assert data["ranks"][1]["variables"]["RANK"] == "1"


def test_a_plan_is_frozen(script: Command, no_devices: None) -> None:
    planned = plan(resolved(num_processes=1), script, {})
    assert isinstance(planned, LaunchPlan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        planned.port = 1  # type: ignore[misc]


def test_more_processes_than_devices(script: Command, four_devices: None) -> None:
    with pytest.raises(ConfigError, match=r"--num_processes.*5 processes are more than the cuda devices \(the 4"):
        plan(resolved(num_processes=5), script, {})
    assert len(plan(resolved(num_processes=5, use_cpu=True), script, {}).ranks) == 5


def test_device_numbers(script: Command, four_devices: None) -> None:
    planned = plan(resolved(num_processes=2, gpu_ids="1,3"), script, {"CUDA_VISIBLE_DEVICES": "0"})
    assert planned.variables["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert "CUDA_VISIBLE_DEVICES" not in plan(resolved(num_processes=2, gpu_ids="all"), script, {}).variables
    assert "CUDA_VISIBLE_DEVICES" not in plan(resolved(num_processes=2), script, {}).variables
    with pytest.raises(ConfigError, match=r"3 processes are more than the cuda devices \(the 2 of gpu_ids"):
        plan(resolved(num_processes=3, gpu_ids="1,3"), script, {})


def test_pinning_goes_by_the_devices_that_the_launcher_sees(
    script: Command, four_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert len(plan(resolved(num_processes=2, enable_cpu_affinity=True), script, {}).ranks) == 2
    with pytest.raises(ConfigError, match=r"gpu_ids 1,3.*CUDA_VISIBLE_DEVICES=1,3 instead"):
        plan(resolved(num_processes=2, enable_cpu_affinity=True, gpu_ids="1,3"), script, {})


def test_device_numbers_without_devices(script: Command, no_devices: None) -> None:
    with pytest.raises(ConfigError, match="--gpu_ids: devices 0,1 are requested"):
        plan(resolved(num_processes=2, gpu_ids="0,1"), script, {})


def test_a_busy_port_and_every_other_problem_at_once(script: Command, no_devices: None) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} cannot be used.*0 for a free port") as caught:
            plan(resolved(num_processes=2, gpu_ids="0", main_process_port=port), script, {})
    assert {problem.key for problem in caught.value.problems} == {"gpu_ids", "main_process_port"}


def test_a_launch_inside_a_launch(script: Command) -> None:
    env = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(UsageError, match="already rank 1 of 4"):
        plan(resolved(num_processes=1), script, env)


def test_a_machine_among_several(script: Command, no_devices: None) -> None:
    settings = resolved(num_processes=4, num_machines=2, machine_rank=1, main_process_ip="10.0.0.1")
    planned = plan(settings, script, {})
    assert [r.variables for r in planned.ranks] == [
        {"RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1"},
        {"RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1"},
    ]
    shown = {name: planned.variables[name] for name in planned.variables if name.endswith(("SIZE", "ADDR", "PORT"))}
    assert shown == {
        "GROUP_WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
        "WORLD_SIZE": "4",
    }
    assert str(planned).startswith("2 processes on machine 1 of 2, meeting at 10.0.0.1, port 29500\n")


def test_machines_of_other_sizes(script: Command, no_devices: None) -> None:
    settings = resolved(num_machines="1:4", rdzv_backend="c10d", main_process_ip="10.0.0.1")
    planned = planning.plan_machine(settings, script, {}, 1, (1, 2, 3), GLOO_SOCKET_IFNAME="eth0")
    assert [r.rank for r in planned.ranks] == [1, 2]
    assert (planned.variables["WORLD_SIZE"], planned.variables["GLOO_SOCKET_IFNAME"]) == ("6", "eth0")
    sent = Resolved.from_json(planned.variables["PACELINE_CONFIG"])
    assert (sent.config.num_processes, sent.config.num_machines) == (6, "1:4")
    assert with_arguments(sent, {}).config == sent.config


def test_several_machines_need_an_address_and_a_port(script: Command, no_devices: None) -> None:
    with pytest.raises(ConfigError) as error:
        plan(resolved(num_processes=2, num_machines=2, main_process_port=0), script, {})
    assert {problem.key for problem in error.value.problems} == {"main_process_ip", "main_process_port"}
    assert plan(resolved(num_processes=2, num_machines=2), script, {"MASTER_ADDR": "head"}).address == "head"


def test_an_open_number_of_processes_is_detected(script: Command, no_devices: None) -> None:
    planned = plan(resolved(), script, {})
    assert len(planned.ranks) == detect({})["num_processes"]
    sent = Resolved.from_json(planned.variables["PACELINE_CONFIG"])
    assert sent.config.num_processes == len(planned.ranks)


def test_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    from paceline.launch import accelerators

    monkeypatch.setattr(accelerators, "count_accelerators", lambda: ("cuda", 8))
    assert detect({}) == {"num_processes": 8}
    for cores, expected in ((1, 1), (2, 2), (64, 2)):
        monkeypatch.setattr(accelerators, "core_count", lambda cores=cores: cores)
        assert detect({}, use_cpu=True) == {"num_processes": expected}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (Command("trian.py"), r"Did you mean 'train\.py'\?"),
        (Command("nothing_like_it.py"), "does not contain it"),
        (Command("no/such/train.py"), "'no/such' does not exist"),
        (Command("package"), r"'package' is a folder without __main__\.py.*\(__init__\.py, part\.py\)"),
        (Command("empty.zip"), "'empty.zip' is a zip archive without __main__"),
        (Command("text.pyz"), "'text.pyz' is not a zip archive"),
        (Command("--lr"), "Options of the launcher come before the script"),
        (Command("torchrun"), "To run a module, add -m"),
        (Command("no_such_module", kind="module"), "no module 'no_such_module'"),
        (Command("package.nope", kind="module"), r"no module 'package\.nope'"),
        (Command("package", kind="module"), "without a __main__"),
        (Command("train.py", kind="module"), "is a file: remove -m"),
        (Command("no-such-program", kind="program"), "no program 'no-such-program'"),
    ],
)
def test_nothing_to_run(command: Command, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (tmp_path / "package" / "part.py").write_text("")
    (tmp_path / "text.pyz").write_text("print()")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("part.py", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=expected):
        plan(resolved(num_processes=1), command, {"PATH": "/usr/bin"})


def test_more_processes_than_cores_are_remarked_on(monkeypatch: pytest.MonkeyPatch, no_devices: None) -> None:
    monkeypatch.setattr(planning, "core_count", lambda: 2)
    assert planning.performance_hints(resolved(num_processes=2).config, {}) == []
    [remark] = planning.performance_hints(resolved(num_processes=3).config, {})
    assert remark.startswith("3 processes share 2 CPU cores")
    monkeypatch.setattr(planning, "count_accelerators", lambda: ("cuda", 8))
    assert planning.performance_hints(resolved(num_processes=8).config, {}) == []


def test_a_module_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (tmp_path / "package" / "part.py").write_text("")
    monkeypatch.chdir(tmp_path)
    planned = plan(resolved(num_processes=1), Command("package.part", kind="module"), {})
    assert planned.ranks[0].command[3:] == ("--module", "package.part")
