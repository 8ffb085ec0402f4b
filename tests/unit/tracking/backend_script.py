"""Logs one short run to one tracker, offline, and prints as JSON what its package reads back."""

from __future__ import annotations

import json
import os
import struct
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline import Accelerator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONFIG = {"learning_rate": 0.1, "model": {"width": 8, "layers": [1, 2]}, "odd": Path("/x")}


def read_tensorboard(folder: Path, run: Any) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "project" / "first"))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["picture"]
    hparams = events.PluginTagToContent("hparams")
    texts = [tag for tag in tags["tensors"] if tag.startswith(("note", "table"))]
    return {
        "loss": [[event.step, event.value] for event in events.Scalars("loss")],
        "config": sorted(hparams),
        "texts": texts,
    }


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a file of wandb: blocks of 32 KiB, in them pieces of records after a head of seven bytes."""
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def read_wandb(folder: Path, run: Any) -> dict[str, Any]:
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    loss, config, ended = [], {}, None
    for data in records_of(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if "loss" in items:
                loss.append([items["_step"], items["loss"]])
        for item in [*record.config.update, *record.run.config.update]:
            config[item.key or ".".join(item.nested_key)] = item.value_json
        if record.WhichOneof("record_type") == "exit":
            ended = record.exit.exit_code
    return {"loss": loss, "config": config, "exit": ended}


def read_mlflow(folder: Path, run: Any) -> dict[str, Any]:
    import mlflow

    client = mlflow.MlflowClient()
    done = client.get_run(run.info.run_id)
    history = client.get_metric_history(run.info.run_id, "loss")
    return {
        "loss": [[metric.step, metric.value] for metric in history],
        "config": done.data.params,
        "status": done.info.status,
        "name": done.info.run_name,
    }


def read_comet(folder: Path, run: Any) -> dict[str, Any]:
    (file,) = folder.glob("comet/*.zip")
    with zipfile.ZipFile(file) as archive:
        lines = archive.read("messages.json").decode().splitlines()
    messages = [json.loads(line) for line in lines]
    found = [message["payload"].get("metric") for message in messages if message["type"] == "metric_msg"]
    loss = [[metric["step"], metric["metricValue"]] for metric in found if metric["metricName"] == "loss"]
    return {"loss": loss, "config": "learning_rate" in "".join(lines)}


def read_aim(folder: Path, run: Any) -> dict[str, Any]:
    import aim

    again = aim.Run(run.hash, repo=str(folder))
    kept = again.collect_sequence_info(("metric",))["metric"]
    (loss,) = [metric["values"] for metric in kept if metric["name"] == "loss"]
    ends = [[loss["first_step"], loss["first"]], [loss["last_step"], loss["last"]]]
    return {"loss": ends, "config": again["hparams"]}


def read_clearml(folder: Path, run: Any) -> dict[str, Any]:
    (file,) = Path(run.get_offline_mode_folder()).parent.glob(f"{run.id}*.zip")
    with zipfile.ZipFile(file) as archive:
        lines = archive.read("metrics.jsonl").decode().splitlines()
        text = archive.read("task.json").decode()
    events = [event for line in lines for event in json.loads(line)]
    loss = [[e["iter"], e["value"]] for e in events if e.get("metric") == "loss" and "value" in e]
    return {"loss": loss, "config": "learning_rate" in text}


def read_dvclive(folder: Path, run: Any) -> dict[str, Any]:
    lines = (folder / "dvclive" / "plots" / "metrics" / "loss.tsv").read_text().splitlines()[1:]
    loss = [[int(line.split("\t")[0]), float(line.split("\t")[1])] for line in lines]
    return {"loss": loss, "config": (folder / "dvclive" / "params.yaml").read_text()}


def read_swanlab(folder: Path, run: Any) -> dict[str, Any]:
    files = [path for path in (folder / "swanlog").rglob("*") if path.is_file()]
    held = b"".join(path.read_bytes() for path in files)
    return {"names": [name for name in ("loss", "learning_rate") if name.encode() in held]}


def read_trackio(folder: Path, run: Any) -> dict[str, Any]:
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("project", "first")
    loss = [[entry["step"], entry["loss"]] for entry in logs if "loss" in entry]
    return {"loss": loss, "config": SQLiteStorage.get_run_config("project", "first")}


READERS: dict[str, Callable[[Path, Any], dict[str, Any]]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "comet_ml": read_comet,
    "aim": read_aim,
    "clearml": read_clearml,
    "dvclive": read_dvclive,
    "swanlab": read_swanlab,
    "trackio": read_trackio,
}


def settings_of(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """How each package is kept from looking for its service."""
    if name == "mlflow":
        return {name: {"tracking_uri": f"sqlite:///{folder}/mlflow.db"}}
    if name == "comet_ml":
        import comet_ml

        config = comet_ml.ExperimentConfig(offline_directory=str(folder / "comet"))
        return {name: {"online": False, "experiment_config": config}}
    if name == "clearml":
        # Its reporter is forked while a thread of its own starts git, and may keep that thread waiting for ever.
        file = folder / "clearml.conf"
        file.write_text("sdk { development { report_use_subprocess: false } }\n", encoding="utf-8")
        os.environ["CLEARML_CONFIG_FILE"] = str(file)
        from clearml import Task

        Task.set_offline(True)
        return {name: {"auto_connect_frameworks": False, "auto_connect_arg_parser": False}}
    if name == "dvclive":
        return {name: {"save_dvc_exp": False, "monitor_system": False}}
    return {name: {"mode": "offline"}} if name in ("wandb", "swanlab") else {}


def main(name: str, folder: Path, crash: bool) -> None:
    os.environ.update(TRACKIO_DIR=str(folder / "trackio"), WANDB_MODE="offline", CLEARML_CACHE_DIR=str(folder))
    accelerator = Accelerator(cpu=True, log_with=name, project_dir=folder)
    accelerator.init_trackers("project", CONFIG, settings_of(name, folder), run_name="first")
    run = accelerator.get_tracker(name, unwrap=True)
    accelerator.log({"loss": torch.tensor(0.5), "note": "text", "parts": {"a": 1.0}}, step=1)
    accelerator.log({"loss": np.float32(0.25)}, step=2)
    tracker = accelerator.get_tracker(name)
    tracker.log_images({"picture": [np.zeros((4, 4, 3), dtype=np.uint8)]}, step=2)
    tracker.log_table("table", ["a", "b"], [[1, 2], [3, 4]], step=2)
    if crash:
        raise RuntimeError("as asked")
    accelerator.end_training()
    print("\n" + json.dumps(READERS[name](folder, run), default=str))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "crash" in sys.argv[3:])
