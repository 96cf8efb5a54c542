"""Whether a config can be trained here, and what that costs: everything that a training does before its first update,
and nothing that it writes (``rome check``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from rome.core.errors import UserError
from rome.core.randomness import unchanged_states
from rome.data import Data
from rome.experts import LowRank
from rome.experts.base import Layerwise
from rome.models import create_model, weights_file
from rome.models.sources import ROBUSTBENCH
from rome.report.cost import macs, parameters, updates
from rome.report.memory import architecture, gigabytes, peak_memory, too_large
from rome.runs.config import Config
from rome.training.setup import assemble, check_settings

SIDE = 32
"""Pixels of the images on which forward passes are counted: their number depends on no size."""


@dataclass
class Checked:
    """What was found."""

    config: Config
    cost: dict[str, Any] = field(default_factory=dict)
    """As far as it is known: ``parameters``, ``trainable``, ``experts``, ``macs`` of a forward pass of one image,
    ``forwards`` an example and update, ``examples``, ``updates`` in all, ``memory`` in bytes
    (:func:`rome.report.memory.peak_memory`)."""
    missing: list[str] = field(default_factory=list)
    """Why it cannot be trained here, a line each."""
    remarks: list[str] = field(default_factory=list)
    """What else there is to know."""


def check(config: Config, memory: float | None = None) -> Checked:
    """Look for everything that a training of the config needs, and count what it costs.

    Args:
        memory: bytes of the GPU that it is to fit; None: those of the GPU that the config would use here.
    """
    found = Checked(config)
    try:
        check_settings(config)
    except UserError as error:
        found.missing += str(error).splitlines()
    fetched = _fetched(config, found)
    with unchanged_states():
        opened = _data(config, found)
        if opened and not found.missing:
            usable = {"data": opened, **({"model": config.model.architecture_only()} if fetched else {})}
            try:
                start = assemble(config.model_copy(deep=True, update=usable), torch.device("cpu"))
                found.cost |= {"examples": len(start.split), "updates": start.steps * config.epochs}
            except UserError as error:
                found.missing.append(str(error))
        try:
            model, shape, _ = architecture(config)
            counts = parameters(model)
            found.cost |= {**counts, "macs": macs(model.eval(), shape)}
            _memory(config, memory, found)
        except UserError as error:
            if not found.missing:  # or it says the same again
                found.missing.append(str(error))
        found.cost["forwards"] = forwards(config)
    return found


def _data(config: Config, found: Checked) -> Data | None:
    """The data set, if both its parts are here; what training would download is a remark."""
    fetches = getattr(config.data, "download", False)
    data = config.data.model_copy(update={"download": False}) if fetches else config.data
    try:
        data.open("train")
        data.open("test")
    except UserError as error:
        if fetches:
            found.remarks.append(f"{config.data.kind} is not in {config.data.path}; training fetches it first")
        else:
            found.missing.append(str(error))
        return None
    return data


def _fetched(config: Config, found: Checked) -> bool:
    """Say which weights are not here; True if they would be downloaded, so that nothing can be tried on them now."""
    source, name = config.model.weights, config.model.name
    if name.startswith(ROBUSTBENCH):
        if find_spec("robustbench") is None:
            found.missing.append(
                f"model {name}: the package robustbench is not installed (docs/decisions/backbones.md)"
            )
        else:
            found.remarks.append(f"the weights of {name} are RobustBench's; training fetches them where they are not")
        return True
    if source is not None:
        try:
            file = weights_file(source)
        except UserError as error:
            found.missing.append(str(error))
            return False
        if not file.is_file():
            found.missing.append(f"model.weights: there is no file {file}")
        return False
    if not config.model.pretrained:
        return False
    from huggingface_hub import constants, try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return False
    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files):
        return False
    where = f"the weights of {name} ({cfg.hf_hub_id}) are not in the cache of the Hugging Face Hub"
    if constants.HF_HUB_OFFLINE:
        found.missing.append(f"{where}, and HF_HUB_OFFLINE forbids fetching them")
    else:
        found.remarks.append(f"{where}; training fetches them first")
    return True


def _memory(config: Config, limit: float | None, found: Checked) -> None:
    """Count the memory, and say where it does not suffice."""
    try:
        counted = peak_memory(config)
    except UserError:  # a network that the method measures with; said already
        return
    except Exception:
        found.remarks.append("memory: not counted, because the method or the attack decides by what it computes")
        return
    found.cost["memory"] = counted
    if limit is None and torch.cuda.is_available() and config.device in ("auto", "cuda"):
        limit = torch.cuda.get_device_properties(0).total_memory
    if limit is None:
        return
    for what, why in too_large(config, counted, limit).items():
        said = found.remarks if what == "evaluation" else found.missing
        said.append(f"memory: {why} (the GPU has {gigabytes(limit)})")


def forwards(config: Config) -> float | None:
    """Forward passes for each example of an update, attack and training, the mean over a method's stages: counted on a
    small transformer in the model's place. None where the method does not run on it."""
    seen = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0])

    try:
        batch = 2 * len(config.method.trained(config.threats, config.attack))
        few = config.model_copy(update={"batch_size": batch, "accumulate": 1, "device": "cpu", "precision": "fp32"})
        args: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2}
        model: nn.Module = create_model("vit_tiny_patch16_224", num_classes=10, img_size=SIDE, patch_size=8, **args)
        if isinstance(config.experts, Layerwise):
            model = LowRank(experts=config.experts.experts, rank=1, gate=config.experts.gate).inject(model)
        elif config.experts is not None:
            model = config.experts.inject(model)
        total = 0.0
        with model.register_forward_pre_hook(count):
            for work, share in updates(few, model, (3, SIDE, SIDE), 10, torch.device("cpu")):
                seen = 0
                work()
                total += share * seen / batch
        return total
    except Exception:  # a method, an attack or experts of the user's own that want another model
        return None


def lines(found: Checked) -> list[str]:
    """The cost and the remarks, to be read by people."""
    cost, config = found.cost, found.config
    said = []
    if "parameters" in cost:
        said.append(
            f"model: {cost['parameters']:,} parameters, {cost['trainable']:,} of them trained, {cost['experts']:,} of "
            f"experts; {cost['macs'] / 1e9:.4g} GMACs a forward pass of one image"
        )
    if cost.get("forwards") is not None:
        said.append(
            f"update: {config.batch_size} examples, {cost['forwards']:.3g} forward passes each, attacks included"
        )
    if "updates" in cost:
        said.append(f"training: {cost['examples']:,} examples, {config.epochs} epochs, {cost['updates']:,} updates")
    if (memory := cost.get("memory")) is not None:
        sizes = {what: gigabytes(size) for what, size in memory.items()}
        said.append(
            f"memory: {sizes['training']} at the peak of training ({sizes['state']} between updates, {sizes['attack']} "
            f"in the attack, {sizes['update']} in the rest of an update), {sizes['evaluation']} in an evaluation; what "
            "CUDA and its allocator take beside is not counted"
        )
    return [*said, *found.remarks]
