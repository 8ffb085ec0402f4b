"""Device maps, offload folders and offloaded models, of Accelerate's own and through transformers and PEFT."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

RUNS: dict[str, Callable[[Path], Any]] = {}
CRASH = "crash"


def run(name: str, folder: str) -> Any:
    torch.manual_seed(0)
    return RUNS[name](Path(folder))


def _run(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    RUNS[function.__name__.replace("_", " ")] = function
    return function


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ x.transpose(-1, -2)
        attended: torch.Tensor = scores.softmax(-1) @ self.value(x) * self.scale
        return attended


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("offset", torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(x + self.attention(x)) + self.offset
        return normed


class Tower(nn.Module):
    """Blocks between tied embeddings and a head."""

    def __init__(self, width: int = 8, blocks: int = 3, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 16, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def _random_tree(choose: random.Random, depth: int = 0) -> nn.Module:
    kind = choose.randrange(5) if depth < 3 else choose.randrange(3)
    if kind == 0:
        return nn.Linear(choose.randrange(1, 12), choose.randrange(1, 12), bias=choose.random() < 0.5)
    if kind == 1:
        return nn.BatchNorm1d(choose.randrange(1, 20))
    if kind == 2:
        return Block(choose.randrange(1, 6))
    return _row([_random_tree(choose, depth + 1) for _ in range(choose.randrange(1, 4))], depth + 1)


def _row(modules: list[nn.Module], depth: int) -> nn.Sequential:
    # No name is a part of another one: Accelerate would take "0" for a module around "2.0.weight".
    return nn.Sequential(collections.OrderedDict((f"d{depth}m{index}", each) for index, each in enumerate(modules)))


def _random_model(seed: int) -> nn.Module:
    choose = random.Random(seed)
    model = _row([_random_tree(choose) for _ in range(choose.randrange(2, 6))], 0)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if choose.random() < 0.5:
        for first, second in itertools.pairwise(linears):
            if first.weight.shape == second.weight.shape or choose.random() < 0.1:
                second.weight = first.weight
    return model


def _attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except ValueError:
        return "ValueError"
    except Exception:  # Accelerate's own faults, such as an IndexError for some tied weights
        return CRASH


@_run
def device_maps(_folder: Path) -> Any:
    """Maps of random models for random limits."""
    return [_device_map(seed) for seed in range(120)]


def _device_map(seed: int) -> Any:
    from accelerate import infer_auto_device_map
    from accelerate.utils import check_device_map, compute_module_sizes, get_balanced_memory

    choose = random.Random(1000 + seed)
    model = _random_model(seed)
    size = compute_module_sizes(model)[""]
    devices = [0, 1, 2][: choose.randrange(4)]
    limits: dict[Any, Any] = {device: int(size * choose.uniform(0.05, 0.8)) for device in devices}
    if choose.random() < 0.6:
        limits["cpu"] = int(size * choose.uniform(0.2, 1.5))
    limits = limits or {"cpu": int(size // 2)}
    options: dict[str, Any] = {
        "no_split_module_classes": choose.choice([None, [], ["Block"], ["Attention", "Block"], "Block"]),
        "dtype": choose.choice([None, None, torch.float16, "float16"]),
    }
    more = {
        "clean_result": choose.random() < 0.8,
        "offload_buffers": choose.random() < 0.5,
        "fallback_allocation": choose.random() < 0.5,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = _attempt(lambda: dict(infer_auto_device_map(model, dict(limits), **options, **more)))
        everything = _attempt(
            lambda: infer_auto_device_map(model, dict(limits), **options, **{**more, "clean_result": False})
        )
    if isinstance(everything, dict) and _attempt(lambda: check_device_map(model, everything)) is not None:
        chosen = CRASH  # a buffer of a module that was split has no device
    # The margin is that of the largest block of a class; Accelerate takes the first one's, whichever that is.
    even = Tower(blocks=choose.randrange(2, 9), tied=seed % 2 == 0)
    options["no_split_module_classes"] = choose.choice([None, ["Block"], ["Attention", "Block"]])
    balanced = _attempt(lambda: get_balanced_memory(even, dict(limits), low_zero=seed % 3 == 0, **options))
    answers = [
        sorted((name, str(device)) for name, device in chosen.items()) if isinstance(chosen, dict) else chosen,
        sorted((str(key), value) for key, value in balanced.items()) if isinstance(balanced, dict) else balanced,
        len(caught),
    ]
    return json.loads(json.dumps(answers))


@_run
def offload_folders(folder: Path) -> Any:
    """What is written to the disk, byte for byte, and read from it."""
    from accelerate.utils import OffloadedWeightsLoader, offload_state_dict, offload_weight, save_offload_index

    weights = {
        "a.float": torch.randn(3, 4),
        "a.half": torch.randn(2, 2).half(),
        "b.bfloat": torch.randn(5).bfloat16(),
        "b.eight": torch.randn(5).to(torch.float8_e4m3fn),
        "c.count": torch.tensor(7),
        "c.flags": torch.tensor([True, False]),
        "c.numbers": torch.arange(6, dtype=torch.int16).view(2, 3),
        "d.sliced": torch.randn(4, 6)[:, ::2],
    }
    offload_state_dict(folder / "weights", weights)
    save_offload_index(offload_weight(torch.ones(2), "e", folder / "weights", {}), folder / "weights")
    loader = OffloadedWeightsLoader(state_dict={"f": torch.zeros(1)}, save_folder=folder / "weights")
    return [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / "weights").glob("*.dat"))
        },
        json.loads((folder / "weights" / "index.json").read_text()),
        {name: [str(loader[name].dtype), list(loader[name].shape), loader[name].float().tolist()] for name in loader},
        len(loader),
    ]


def _logits(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(torch.arange(12).view(2, 6)).tolist()


@_run
def offloaded_models(folder: Path) -> Any:
    """Outputs, and what modules have between forwards."""
    from accelerate import cpu_offload, disk_offload, dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    found: list[Any] = []
    for buffers, preload in ((False, None), (True, None), (True, ["Attention"])):
        for way in ("cpu", "disk", "dispatch"):
            torch.manual_seed(1)
            model = Tower()
            place = folder / f"{way}{buffers}{preload}"
            if way == "cpu":
                cpu_offload(model, torch.device("cpu"), buffers, preload_module_classes=preload)
            elif way == "disk":
                disk_offload(model, place, torch.device("cpu"), buffers, preload_module_classes=preload)
            else:
                names = {"embedding": "cpu", "blocks.0": "disk", "blocks.1": "cpu", "blocks.2": "disk", "head": "cpu"}
                dispatch_model(model, names, offload_dir=place, offload_buffers=buffers, preload_module_classes=preload)
            found.append([_logits(model), _logits(model), _devices(model)])
            hooks = [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
            remove_hook_from_submodules(model)
            found.append([hooks, _devices(model)])
    return found


def _devices(model: nn.Module) -> dict[str, str]:
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: f"{tensor.device} {tensor.requires_grad}" for name, tensor in tensors}


@_run
def checkpoints(folder: Path) -> Any:
    """Loading with device maps: whole and sharded files of both formats."""
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from safetensors.torch import save_file

    model = Tower(tied=False)
    state = model.state_dict()
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    for kind, save in (("bin", torch.save), ("safetensors", save_file)):
        place = folder / kind
        place.mkdir()
        save(state, place / ("pytorch_model.bin" if kind == "bin" else "model.safetensors"))
        shards = folder / f"{kind}-shards"
        shards.mkdir()
        names = {name: f"part{part}.{kind}" for part, half in enumerate(halves) for name in half}
        (shards / "weights.index.json").write_text(json.dumps({"weight_map": names}))
        for part, half in enumerate(halves):
            save(half, shards / f"part{part}.{kind}")
    found = [_logits(model)]
    maps: list[Any] = [
        None,
        {"": "cpu"},
        {"embedding": "cpu", "blocks": "disk", "head": "cpu"},
        {"embedding": "disk", "blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "disk", "head": "disk"},
    ]
    for source in ("bin", "safetensors", "bin-shards", "safetensors-shards"):
        for number, device_map in enumerate(maps):
            for dtype in (None, "bfloat16"):
                if device_map is None:
                    empty = Tower(tied=False)
                else:
                    with init_empty_weights():
                        empty = Tower(tied=False)
                offload = folder / f"{source}{number}{dtype}"
                loaded = load_checkpoint_and_dispatch(
                    empty, folder / source, device_map, offload_folder=offload, dtype=dtype, offload_buffers=True
                )
                if dtype is not None and device_map is not None:
                    loaded.float() if number == 1 else None
                    found.append(_devices(loaded))
                else:
                    found.append([_logits(loaded), _devices(loaded)])
    return found


def _saved_llama(folder: Path, tied: bool) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    return folder


def _generated(model: Any) -> Any:
    ids = torch.arange(1, 11).view(2, 5)
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return [logits[:, -1].tolist(), tokens.tolist()]


@_run
def transformers_device_maps(folder: Path) -> Any:
    """`from_pretrained` with every kind of device map, disk included."""
    from transformers import AutoModelForCausalLM

    found: list[Any] = []
    for tied in (False, True):
        saved = _saved_llama(folder / f"tied{tied}", tied)
        ways: list[dict[str, Any]] = [
            {"device_map": "cpu"},
            {"device_map": "auto"},
            {"device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": folder / "a"},
            {"device_map": "balanced", "max_memory": {"cpu": "60KB"}, "offload_folder": folder / "b"},
            {"device_map": "sequential", "max_memory": {"cpu": "60KB"}, "offload_folder": folder / "c"},
            {
                "device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": folder / "d",
                "offload_buffers": True,
            },
            {
                "device_map": "auto", "max_memory": {"cpu": 50_000}, "offload_folder": folder / "e",
                "dtype": torch.bfloat16,
            },
            {
                "device_map": {
                    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
                    **{f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(4)},
                },
                "offload_folder": folder / "f",
            },
        ]  # fmt: skip
        for way in ways:
            model = AutoModelForCausalLM.from_pretrained(saved, **way)
            devices = {name: str(device) for name, device in getattr(model, "hf_device_map", {}).items()}
            found.append([devices, _generated(model), sorted({str(each.device) for each in model.parameters()})])
    return found


@_run
def saving_an_offloaded_model(folder: Path) -> Any:
    """`save_pretrained` of a model that is partly on disk."""
    from transformers import AutoModelForCausalLM

    saved = _saved_llama(folder / "saved", False)
    model = AutoModelForCausalLM.from_pretrained(
        saved, device_map="auto", max_memory={"cpu": 50_000}, offload_folder=folder / "offload"
    )
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again")
    return [_generated(again), sorted(path.name for path in (folder / "again").iterdir())]


@_run
def lora_on_an_offloaded_model(folder: Path) -> Any:
    """PEFT: an adapter on a model that is partly on disk, its gradients, and merged into it."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    saved = _saved_llama(folder / "saved", False)
    plain = AutoModelForCausalLM.from_pretrained(saved)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    get_peft_model(plain, config).save_pretrained(str(folder / "adapter"))
    offload = {"device_map": "auto", "max_memory": {"cpu": 50_000}, "offload_folder": folder / "offload"}
    model = AutoModelForCausalLM.from_pretrained(saved, **offload)
    adapted = PeftModel.from_pretrained(
        model, folder / "adapter", max_memory={"cpu": 50_000}, offload_folder=folder / "offload"
    )
    return [_generated(adapted), str(sorted({str(each.device) for each in adapted.parameters()}))]


def _small_models() -> dict[str, Callable[[], Any]]:
    """Models of other kinds: encoder and decoder, experts, state spaces, convolutions, images."""
    import transformers as t

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**sizes, intermediate_size=48)),
        "mixtral": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(**sizes, intermediate_size=24, num_key_value_heads=2, num_local_experts=4)
        ),
        "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3)),
        "vit": lambda: t.ViTForImageClassification(
            t.ViTConfig(
                image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                intermediate_size=48,
            )
        ),
    }  # fmt: skip


@_run
def models_of_other_kinds(folder: Path) -> Any:
    """Each saved and loaded with most of it on disk."""
    from accelerate.utils import compute_module_sizes

    found = {}
    for name, make in _small_models().items():
        torch.manual_seed(7)
        original = make().eval()
        original.save_pretrained(folder / name, max_shard_size="50KB")
        half = int(compute_module_sizes(original)[""] * 0.6)
        model = type(original).from_pretrained(
            folder / name, device_map="auto", max_memory={"cpu": half}, offload_folder=folder / f"{name} offload"
        )
        inputs: dict[str, Any] = {"input_ids": torch.arange(1, 11).view(2, 5)}
        if name == "vit":
            inputs = {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)}
        elif name == "t5":
            inputs["decoder_input_ids"] = torch.arange(3, 9).view(2, 3)
        with torch.no_grad():
            outputs = [model(**inputs).logits.flatten()[:200].tolist() for _ in range(2)]
            whole = original(**inputs).logits.flatten()[:200].tolist()
        same = all(torch.allclose(torch.tensor(each), torch.tensor(whole), atol=1e-5) for each in outputs)
        found[name] = [outputs, same, sorted({str(device) for device in model.hf_device_map.values()})]
    return found
