"""Where a checkpoint lies: behind links, `..` and `~`, and who may read it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline import Accelerator, ProjectConfiguration
from paceline.checkpoint import find_checkpoints, newest_checkpoint, open_checkpoint
from paceline.errors import CheckpointError, DamagedCheckpointError, PacelineError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Run:
    """A tiny training in this process, whose checkpoints tell its steps."""

    def __init__(self, project: str | Path | None = None, **settings: Any) -> None:
        config = None
        if project is not None:
            config = ProjectConfiguration(
                project_dir=str(project), automatic_checkpoint_naming=True, save_on_signals=(), **settings
            )
        self.accelerator = Accelerator(cpu=True, strategy="single", project_config=config)
        model: Any = torch.nn.Linear(3, 2)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def step(self) -> None:
        self.accelerator.backward(self.model(torch.ones(1, 3)).sum())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, where: str | Path | None = None, *, steps: int = 1, **how: Any) -> str:
        for _ in range(steps):
            self.step()
        return self.accelerator.save_state(where, **how)

    def holds(self, folder: str | Path) -> bool:
        """Whether the state in a folder is that of this moment."""
        other = Run()
        other.accelerator.load_state(folder)
        same = torch.equal(other.model.weight, self.model.weight)
        return same and other.optimizer.num_steps == self.optimizer.num_steps


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a home of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


# Names that lead elsewhere


def to_a_folder(root: Path) -> tuple[str, Path]:
    (root / "disk").mkdir()
    (root / "state").symlink_to("disk")
    return "state", root / "disk"


def to_a_link_to_a_folder(root: Path) -> tuple[str, Path]:
    (root / "disk").mkdir()
    (root / "second").symlink_to(root / "disk")
    (root / "state").symlink_to("second")
    return str(root / "state"), root / "disk"


def behind_a_link(root: Path) -> tuple[str, Path]:
    (root / "disk" / "far").mkdir(parents=True)
    (root / "near").symlink_to("disk/far")
    return "near/state", root / "disk" / "far" / "state"


def up_from_behind_a_link(root: Path) -> tuple[str, Path]:
    # As the system follows it: `..` of what the link leads to.
    (root / "disk" / "far").mkdir(parents=True)
    (root / "near").symlink_to("disk/far")
    return "near/../state", root / "disk" / "state"


def to_where_nothing_is_yet(root: Path) -> tuple[str, Path]:
    (root / "state").symlink_to("disk/not/there/yet")
    return "state", root / "disk" / "not" / "there" / "yet"


def in_the_home(root: Path) -> tuple[str, Path]:
    return "~/runs/state", root / "home" / "runs" / "state"


def in_a_home_that_links(root: Path) -> tuple[str, Path]:
    (root / "scratch").mkdir()
    (root / "home" / "runs").symlink_to("../scratch")
    return "~/runs/../runs/state", root / "runs" / "state"


def named_with_a_tilde(root: Path) -> tuple[str, Path]:
    return "~backup-of-nobody", root / "~backup-of-nobody"


WAYS = [
    to_a_folder,
    to_a_link_to_a_folder,
    behind_a_link,
    up_from_behind_a_link,
    to_where_nothing_is_yet,
    in_the_home,
    in_a_home_that_links,
    named_with_a_tilde,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_name_is_what_it_leads_to(here: Path, way: Any) -> None:
    named, place = way(here)
    links = {path: path.readlink() for path in here.rglob("*") if path.is_symlink()}
    run = Run()
    for blocking in (True, False):
        run.save(named, blocking=blocking)
        run.accelerator.wait_for_save()
        # Through the name and at the place itself, the same checkpoint; the one before was replaced.
        assert run.holds(named)
        assert run.holds(place)
        assert open_checkpoint(named).folder == place
        assert newest_checkpoint(place.parent) is not None
    assert {path: path.readlink() for path in links} == links
    assert not [path for path in here.rglob("*") if ".partial-" in path.name or ".replaced-" in path.name]
    if not named.startswith("~backup"):
        assert not (here / "~").exists()


def test_a_link_that_is_moved_on_in_between(here: Path) -> None:
    run = Run()
    (here / "latest").symlink_to("one")
    run.save("latest")
    (here / "latest").unlink()
    (here / "latest").symlink_to("two")
    run.save("latest", steps=2)
    assert [open_checkpoint(here / name).manifest.step for name in ("one", "two", "latest")] == [1, 3, 3]


def test_links_that_lead_nowhere_are_named(here: Path) -> None:
    (here / "latest").symlink_to("gone")
    with pytest.raises(DamagedCheckpointError, match=r"There is no folder .*/gone, and .*latest is a link to it"):
        Run().accelerator.load_state("latest")
    (here / "file").write_text("text")
    (here / "to_file").symlink_to("file")
    with pytest.raises(DamagedCheckpointError, match=r"/file is a file, not a folder, and .*to_file is a link to it"):
        Run().accelerator.load_state("to_file")
    with pytest.raises(CheckpointError, match=r"/file is a file"):
        Run().save("to_file")
    assert (here / "file").read_text() == "text"


@pytest.mark.parametrize("name", ["one", "one/inner", "self"])
def test_links_in_a_circle_are_named(here: Path, name: str) -> None:
    (here / "one").symlink_to("two")
    (here / "two").symlink_to("one")
    (here / "self").symlink_to("self")
    for use in (Run().save, Run().accelerator.load_state):
        with pytest.raises(CheckpointError, match=r"cannot be followed.*leads back to itself.*Remove the link"):
            use(name)
    assert names(here) == {"one", "two", "self", "home"}


def test_the_folder_that_a_script_works_in_is_found_behind_a_link(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "work").mkdir()
    (here / "link").symlink_to("work")
    monkeypatch.chdir(here / "work")
    with pytest.raises(CheckpointError, match="the working directory of this process"):
        Run().save(here / "link")


def test_links_among_the_files_are_refused_with_a_remedy(here: Path) -> None:
    Run().save("real")
    (here / "linked").mkdir()
    for path in (here / "real").iterdir():
        (here / "linked" / path.name).symlink_to(path)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is a link.*cp -rL makes a copy"):
        Run().accelerator.load_state("linked")
    shutil.copytree(here / "linked", here / "copied")
    Run().accelerator.load_state("copied")


# A project's folder


@pytest.mark.parametrize("place", ["~/project", "link", "link/../project", "project"])
def test_a_project_may_lie_behind_a_link(here: Path, place: str) -> None:
    (here / "project").mkdir()
    (here / "disk").mkdir()
    (here / "link").symlink_to("disk")
    run = Run(place, total_limit=2)
    for _ in range(4):
        run.save()
    real = {"~/project": here / "home" / "project", "link": here / "disk"}.get(place, here / "project")
    assert names(real / "checkpoints") == {"checkpoint_2", "checkpoint_3"}
    again = Run(place)
    loaded = again.accelerator.load_state()
    assert loaded is not None
    assert Path(loaded).resolve() == real / "checkpoints" / "checkpoint_3"
    assert torch.equal(again.model.weight, run.model.weight)
    assert not (here / "~").exists()


def test_the_folder_of_checkpoints_may_be_a_link(here: Path) -> None:
    (here / "disk").mkdir()
    (here / "project").mkdir()
    (here / "project" / "checkpoints").symlink_to(here / "disk")
    run = Run("project", total_limit=1)
    for _ in range(3):
        run.save(blocking=False)
    run.accelerator.wait_for_save()
    assert names(here / "disk") == {"checkpoint_2"}
    assert Run("project").accelerator.load_state() is not None


# Making room


def test_of_a_checkpoint_that_was_moved_away_only_the_link_goes(here: Path) -> None:
    run = Run("project", total_limit=2)
    run.save()
    inside = here / "project" / "checkpoints"
    (inside / "checkpoint_0").rename(here / "archive")
    (inside / "checkpoint_0").symlink_to(here / "archive")
    run.save()
    assert [found.checkpoint is not None for found in find_checkpoints("project")] == [True, True]
    run.save()
    assert names(inside) == {"checkpoint_1", "checkpoint_2"}
    assert open_checkpoint(here / "archive").manifest.step == 1


@pytest.mark.parametrize("where", ["project/checkpoints/best", "project/best"])
def test_what_a_link_pins_stays(here: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    run = Run("project", total_limit=1)
    first = Path(run.save()).resolve()
    (here / where).symlink_to(first)
    with caplog.at_level(logging.INFO, "paceline"):
        run.save(steps=1)
        run.save(steps=1)
    inside = here / "project" / "checkpoints"
    assert {"checkpoint_0", "checkpoint_2"} == names(inside) - {"best"}
    assert open_checkpoint(here / where).manifest.step == 1
    assert "kept checkpoint_0 beyond total_limit" in caplog.text
    # The newest goes on, not what is pinned.
    assert str(Run("project").accelerator.load_state()).endswith("checkpoint_2")
    (here / where).unlink()
    run.save()
    assert names(inside) == {"checkpoint_3"}


def test_two_names_of_one_checkpoint_count_once(here: Path) -> None:
    run = Run("project", total_limit=2)
    run.save()
    inside = here / "project" / "checkpoints"
    run.save()
    (inside / "checkpoint_2").symlink_to("checkpoint_1")
    run.save()
    assert names(inside) == {"checkpoint_1", "checkpoint_2", "checkpoint_3"}
    assert open_checkpoint(inside / "checkpoint_2").manifest.step == 2


def test_dangling_links_and_circles_among_checkpoints(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run("project", total_limit=2)
    run.save()
    inside = here / "project" / "checkpoints"
    (inside / "checkpoint_7").symlink_to("/nowhere/at/all")
    (inside / "checkpoint_8").symlink_to("checkpoint_8")
    (inside / "latest").symlink_to("gone")
    (here / "project" / "latest").symlink_to("checkpoints/gone")
    found = {entry.folder.name: entry.problem for entry in find_checkpoints("project")}
    assert set(found) == {"checkpoint_0", "checkpoint_7", "checkpoint_8"}
    assert "is a link to it" in found["checkpoint_7"]
    assert "leads back to itself" in found["checkpoint_8"]
    with caplog.at_level(logging.WARNING, "paceline"):
        loaded = Run("project").accelerator.load_state()
    assert str(loaded).endswith("checkpoint_0")
    assert "skipped checkpoint_7" in caplog.text
    # The number of a link is taken, wherever it leads.
    assert run.save().endswith("checkpoint_9")
    assert run.save().endswith("checkpoint_10")
    assert names(inside) == {"checkpoint_9", "checkpoint_10", "latest"}


# Who may read it


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_permissions_of_the_umask(here: Path, umask: int) -> None:
    run = Run()
    run.save("state")
    run.save("background", blocking=False)
    run.accelerator.wait_for_save()
    run.accelerator.save_model(run.model, "weights")
    run.accelerator.save_model(run.model, "shards", max_shard_size=16)
    # Over older ones too.
    run.accelerator.save_model(run.model, "weights")
    folders = [here / name for name in ("state", "background", "weights", "shards")]
    files = [path for folder in folders for path in folder.iterdir()]
    assert len(files) == 12
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o777 & ~umask}
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files
    }


def test_models_are_saved_into_the_home_and_through_links(here: Path) -> None:
    run = Run()
    (here / "link").symlink_to("elsewhere")
    for name, place in (("~/model", here / "home" / "model"), ("link", here / "elsewhere")):
        run.accelerator.save_model(run.model, name)
        assert names(place) == {"model.safetensors"}
    assert (here / "link").is_symlink()
    run.accelerator.save_model(run.model, "~backup-of-nobody")
    assert names(here) == {"home", "link", "elsewhere", "~backup-of-nobody"}
    (here / "circle").symlink_to("circle")
    with pytest.raises(PacelineError, match=r"could not be saved into circle.*leads back to itself"):
        run.accelerator.save_model(run.model, "circle")


def test_a_folder_that_cannot_be_written_to_is_an_error(here: Path) -> None:
    (here / "locked").symlink_to("/proc/self")
    with pytest.raises(CheckpointError, match="could not be written"):
        Run().save("locked/state")


def test_manifests_do_not_say_where_they_lie(here: Path) -> None:
    (here / "near").symlink_to("home")
    Run().save("near/state")
    assert str(here) not in json.dumps(json.loads((here / "home" / "state" / "manifest.json").read_text()))
