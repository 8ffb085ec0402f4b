"""Builds the model that a command line names, without memory for its weights, and batches for it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paceline.errors import MissingExtraError, UsageError, did_you_mean

__all__ = ["ModelSource", "build_model", "load_attribute", "model_source"]

_TOKENS = 2048
_OF_TRAINING = ("labels", "use_cache")
_WITH_LABELS = ("ForCausalLM", "ForMaskedLM", "LMHeadModel", "ForConditionalGeneration", "ForPreTraining")
_WITH_CLASSES = ("ForSequenceClassification", "ForImageClassification")


@dataclass(frozen=True)
class ModelSource:
    """A model, and how to call it.

    Attributes:
        model: On the meta device.
        batch_of: Called with a number of samples; returns a batch on the CPU. None if no batch is known.
        samples: What a sample is, in words.
    """

    model: nn.Module
    batch_of: Callable[[int], Any] | None
    samples: str

    def infer(self, model: nn.Module, batch: int) -> Any:
        """Run the forward on this many samples: without labels, and with a cache where the model keeps one."""
        return self._call(model, batch, without=_OF_TRAINING)

    def _call(self, model: nn.Module, batch: int, without: Container[str] = ()) -> Any:
        assert self.batch_of is not None
        inputs = self.batch_of(batch)
        if isinstance(inputs, dict):
            inputs = {name: value for name, value in inputs.items() if name not in without}
        with _without_packing():
            if isinstance(inputs, dict):
                return model(**inputs)
            return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)

    def loss(self, model: nn.Module, batch: int) -> torch.Tensor:
        """Run the forward and return the loss: what the model calls so, else the mean of what it returns."""
        result = self._call(model, batch)
        loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
        if loss is not None:
            found: torch.Tensor = loss
            return found
        from torch.utils._pytree import tree_leaves

        values = [leaf for leaf in tree_leaves(_plain(result)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if not values:
            why = "A training step needs a loss to go back from"
            todo = "Return the loss, and leave some weights trainable; without --inputs the state alone is shown"
            raise UsageError("The forward returns nothing that depends on weights that require gradients", why, todo)
        return values[0].float().mean()


def _plain(result: Any) -> Any:
    """The values of an output class of transformers, which is not a tree to torch unless it was registered."""
    return list(result.values()) if isinstance(result, Mapping) else result


def build_model(name: str, flag: str) -> nn.Module:
    """Build a model on the meta device.

    Args:
        name: `module:function`, `file.py:function`, or the file or folder of a transformers configuration.
        flag: Where it was named, for errors.

    Raises:
        UsageError: There is no such model, or it cannot be built.
        MissingExtraError: transformers is not installed.
    """
    path = Path(name)
    if path.exists() and path.suffix != ".py":
        return _from_configuration(path, flag)
    return _from_function(name, flag)


def model_source(name: str, inputs: str | None, sequence_length: int | None) -> ModelSource:
    """Build a model on the meta device, and find out what it takes.

    Args:
        name: As for `build_model`.
        inputs: `module:function` that makes a batch of a number of samples.
        sequence_length: Tokens of a sample, for models of text.

    Raises:
        UsageError: There is no such model, or it cannot be built.
        MissingExtraError: transformers is not installed.
    """
    model = build_model(name, "MODEL")
    if inputs is not None:
        return ModelSource(model, _batch_function(inputs), "samples")
    if not hasattr(model, "main_input_name"):
        return ModelSource(model, None, "samples")
    return _with_own_batches(model, sequence_length)


def _from_function(name: str, flag: str) -> nn.Module:
    found = load_attribute(name, flag)
    is_factory = isinstance(found, type) or not isinstance(found, nn.Module)
    hint = "Name a function without arguments that returns the model"
    if is_factory and (not callable(found) or _required_arguments(found)):
        missing = ", ".join(_required_arguments(found)) if callable(found) else ""
        seen = f"needs arguments: {missing}" if missing else f"is of type {type(found).__name__}"
        raise UsageError(f"{flag} {name} {seen}", "It is called without arguments, and must return the model", hint)
    try:
        with torch.device("meta"):
            model = found() if is_factory else found
    except Exception as error:
        raise UsageError(
            f"{flag} {name} failed: {type(error).__name__}: {error}",
            "It was called on the meta device, where tensors have shapes and no values, so that weights take no memory",
            "Leave out of it what reads values or sets them, such as .item(), or weights from a file",
        ) from error
    if not isinstance(model, nn.Module):
        why = "It must be a torch.nn.Module, or a function without arguments that returns one"
        raise UsageError(f"{flag} {name} is of type {type(model).__name__}", why, hint)
    return model


def _required_arguments(found: Callable[..., Any]) -> list[str]:
    """The names of the arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # not known, as of some built-in functions
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.default is each.empty and each.kind not in optional]


def load_attribute(name: str, flag: str) -> Any:
    """Import what `module:attribute` or `file.py:attribute` names.

    Args:
        name: The name.
        flag: Who asks, for errors.

    Raises:
        UsageError: There is no such thing.
    """
    module_name, separator, attribute = name.rpartition(":")
    if not separator or not module_name:
        raise _without_function(name, flag)
    try:
        module = _module(module_name)
        found: Any = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        hint = did_you_mean(str(error.name), dir(error.obj)) or "Check the name"
        raise UsageError(f"{flag} {name} cannot be imported: {error}", "", hint) from error
    except (ImportError, FileNotFoundError) as error:
        raise UsageError(f"{flag} {name} cannot be imported: {error}", "", "Check the name") from error
    return found


def _batch_function(name: str) -> Callable[..., Any]:
    """The function that makes a batch.

    Raises:
        UsageError: There is none, or it does not take a number of samples.
    """
    function: Callable[..., Any] = load_attribute(name, "--inputs")
    try:
        inspect.signature(function).bind(1)
    except TypeError as error:
        what, why = f"--inputs {name} cannot be called with a number of samples", str(error)
        raise UsageError(what, why, "Let it take one argument, the number of samples, and return a batch") from error
    except ValueError:
        # Functions of C code need not tell what they take.
        pass
    return function


def _without_function(name: str, flag: str) -> UsageError:
    """What to do about a name without a function."""
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        why = "It is neither module:function nor file.py:function"
        if flag != "--inputs":
            why += ", nor a file or folder that exists (names of the Hugging Face Hub are not looked up)"
        return UsageError(f"{flag} {name} cannot be found", why, "Write, for example, my_package.models:build_model")
    try:
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError):
        nodes = []
    functions = [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    seen = f"{flag} {name} is a Python file, without the name of a function"
    if not functions:
        return UsageError(seen, "It defines none", f"Put what builds the model into one, and write {name}:build_model")
    return UsageError(seen, f"It defines {', '.join(functions[:8])}", f"Write, for example, {name}:{functions[0]}")


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        return import_module(name)
    path = Path(name)
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _from_configuration(path: Path, flag: str) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError(
            f"{path} is a configuration of transformers", "transformers is not installed", "pip install transformers"
        ) from None
    read: Any = transformers.AutoConfig.from_pretrained
    try:
        config = read(str(path))
        named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
        make: Any = named[0]._from_config if named and named[0] is not None else _auto_class(transformers, config)
        # Weights in fp32, whatever dtype the file names: what mixed precision trains.
        with torch.device("meta"):
            model: nn.Module = make(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        why = "It must hold the config.json of a model of transformers"
        raise UsageError(f"{flag} {path} cannot be read: {error}", why, "Name such a file or folder") from error
    return model


def _auto_class(transformers: Any, config: Any) -> Any:
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if type(config) in mapping else transformers.AutoModel
    return auto.from_config


def _with_own_batches(model: Any, sequence_length: int | None) -> ModelSource:
    config, kind = model.config, type(model).__name__
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if model.main_input_name == "input_ids" and getattr(text, "vocab_size", None):
        longest = getattr(text, "max_position_embeddings", None) or _TOKENS
        length = sequence_length or min(longest, _TOKENS)

        def tokens(batch: int) -> dict[str, Any]:
            ids = torch.zeros(batch, length, dtype=torch.long)
            # A cache of keys and values is of no use in training; recomputed blocks would fill it twice.
            cache = {"use_cache": False} if getattr(text, "use_cache", False) else {}
            return {"input_ids": ids, **cache, **_labels(kind, batch, ids)}

        return ModelSource(model, tokens, f"sequences of {length} tokens")
    size = getattr(config, "image_size", None)
    if model.main_input_name == "pixel_values" and isinstance(size, int):

        def images(batch: int) -> dict[str, Any]:
            pixels = torch.zeros(batch, getattr(config, "num_channels", 3), size, size)
            return {"pixel_values": pixels, **_labels(kind, batch, pixels)}

        return ModelSource(model, images, f"images of {size} x {size} pixels")
    return ModelSource(model, None, "samples")


def _labels(kind: str, batch: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    if kind.endswith(_WITH_LABELS):
        return {"labels": ids}
    return {"labels": torch.zeros(batch, dtype=torch.long)} if kind.endswith(_WITH_CLASSES) else {}


@contextmanager
def _without_packing() -> Iterator[None]:
    """Keep transformers from asking position ids for packed samples: in a trace it would take all for packed.

    It then builds a mask of sequence length x sequence length, which a run does without.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    find = getattr(masks, "find_packed_sequence_indices", None)
    if find is None:
        yield
        return
    masks.find_packed_sequence_indices = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = find
