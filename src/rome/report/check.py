"""Check whether a config can be trained here and what that costs (``rome check``): does everything that training does
before its first update, but writes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from rome.core.errors import UserError
from rome.core.randomness import unchanged_states
from rome.data import Data
from rome.models import weights_file
from rome.models.sources import ROBUSTBENCH
from rome.report.cost import macs, parameters
from rome.report.memory import architecture, gigabytes, peak_memory, too_large
from rome.report.passes import Passes, hours, of_evaluation, of_update
from rome.runs.config import Config
from rome.training.setup import assemble, check_settings


@dataclass
class CheckResult:
    """Result of :func:`check`."""

    config: Config
    cost: dict[str, Any] = field(default_factory=dict)
    """Costs, as far as they are known: ``parameters``, ``trainable``, ``experts``; ``macs`` of a forward pass of one
    image; ``examples`` in training, ``tested`` images, ``updates`` in total; ``memory`` in bytes
    (:func:`rome.report.memory.peak_memory`); ``update`` and ``evaluation``, passes per image
    (:class:`rome.report.passes.Passes`); ``training_flops`` and ``evaluation_flops``, floating-point operations;
    ``training_hours``, least and most, if a rate was measured."""
    missing: list[str] = field(default_factory=list)
    """Reasons why the config cannot be trained here, one line each."""
    remarks: list[str] = field(default_factory=list)
    """Further remarks, one line each."""


def check(config: Config, memory: float | None = None) -> CheckResult:
    """Look for everything that training the config needs, and count what it costs.

    Args:
        memory: memory in bytes of the GPU that training must fit into; None: that of the GPU the config would use here.
    """
    found = CheckResult(config)
    try:
        check_settings(config)
    except UserError as error:
        found.missing += str(error).splitlines()
    must_download = _must_download(config, found)
    with unchanged_states():
        opened = _data(config, found)
        if opened and not found.missing:
            usable = {"data": opened, **({"model": config.model.architecture_only()} if must_download else {})}
            try:
                start = assemble(config.model_copy(deep=True, update=usable), torch.device("cpu"))
                found.cost |= {"examples": len(start.split), "updates": start.steps * config.epochs}
            except UserError as error:
                found.missing.append(str(error))
        try:
            model, shape, classes = architecture(config)
            found.cost["classes"] = classes
            counts = parameters(model)
            found.cost |= {**counts, "macs": macs(model.eval(), shape)}
            _memory(config, memory, found)
        except UserError as error:
            if not found.missing:  # otherwise it repeats what is missing
                found.missing.append(str(error))
        _passes(config, found)
    return found


def _data(config: Config, found: CheckResult) -> Data | None:
    """Open the data set's training and test parts; None if they are not here. A download that training would start is
    only remarked on."""
    downloads = getattr(config.data, "download", False)
    data = config.data.model_copy(update={"download": False}) if downloads else config.data
    try:
        data.open("train")
        found.cost["tested"] = len(data.open("test"))
    except UserError as error:
        if downloads:
            found.remarks.append(f"{config.data.kind} is not in {config.data.path}; training downloads it first")
        else:
            found.missing.append(str(error))
        return None
    return data


def _must_download(config: Config, found: CheckResult) -> bool:
    """Report weights that are not here; return True if training would download them, so they cannot be tried yet."""
    source, name = config.model.weights, config.model.name
    if name.startswith(ROBUSTBENCH):
        if find_spec("robustbench") is None:
            found.missing.append(
                f"model {name}: the package robustbench is not installed (docs/decisions/backbones.md)"
            )
        else:
            found.remarks.append(
                f"the weights of {name} come from RobustBench; training downloads them unless they are here"
            )
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
        found.missing.append(f"{where}, and HF_HUB_OFFLINE forbids downloading them")
    else:
        found.remarks.append(f"{where}; training downloads them first")
    return True


def _memory(config: Config, limit: float | None, found: CheckResult) -> None:
    """Count the memory, and report where the GPU does not have enough."""
    try:
        counted = peak_memory(config)
    except Exception:  # from tensors without content, or a network that is not here
        found.remarks.append(
            "memory: not counted, because the control flow of the method, attack or experts depends on computed values"
        )
        return
    found.cost["memory"] = counted
    if limit is None and torch.cuda.is_available() and config.device in ("auto", "cuda"):
        limit = torch.cuda.get_device_properties(0).total_memory
    if limit is None:
        return
    for what, why in too_large(config, counted, limit).items():
        where = found.remarks if what == "evaluation" else found.missing
        where.append(f"memory: {why}; the GPU has {gigabytes(limit)}")


def _passes(config: Config, found: CheckResult) -> None:
    """Count passes and floating-point operations."""
    cost = found.cost
    update, evaluation = of_update(config), of_evaluation(config, cost.get("classes", 10))
    cost |= {name: vars(passes) for name, passes in (("update", update), ("evaluation", evaluation)) if passes}
    each = 2 * cost.get("macs", 0)
    if each and update and "updates" in cost:
        share = config.natural_epochs / config.epochs
        work = (1 - share) * update.work + share * Passes(forward=1, whole=1).work
        cost["training_flops"] = each * work * config.batch_size * cost["updates"]
        cost["training_hours"] = hours(config, cost["training_flops"])
    images = [n for n in (config.evaluation.n, cost.get("tested")) if n is not None]
    if each and evaluation and images:
        cost["evaluation_flops"] = each * evaluation.work * min(images)


def lines(found: CheckResult) -> list[str]:
    """Describe the cost and the remarks in readable lines."""
    cost, config = found.cost, found.config
    text = []
    if "parameters" in cost:
        text.append(
            f"model: {cost['parameters']:,} parameters, {cost['trainable']:,} of them trained, {cost['experts']:,} in "
            f"experts; {cost['macs'] / 1e9:.4g} GMACs per forward pass of one image"
        )
    if "update" in cost:
        text.append(f"update: {config.batch_size} examples, {_counts(cost['update'])} each, attacks included")
    if "updates" in cost:
        line = f"training: {cost['examples']:,} examples, {config.epochs} epochs, {cost['updates']:,} updates"
        if flops := cost.get("training_flops"):
            known, line = cost["training_hours"], f"{line}, {flops:.3g} floating-point operations"
            line += (
                ": no rate was measured for this model and precision"
                if known is None
                else f": {known[0]:.3g} to {known[1]:.3g} hours on one H200 at the rates measured for attack steps, "
                "not counting the time between steps"
            )
        text.append(line)
    if "evaluation" in cost:
        images, precision = config.evaluation.n or "all", config.evaluation.search_precision
        line = f"evaluation: {images} images, up to {_counts(cost['evaluation'])} each, in {precision}"
        if flops := cost.get("evaluation_flops"):
            line += f", {flops:.3g} floating-point operations: no rate was measured in {precision}"
        text.append(line)
    else:
        text.append("evaluation: passes not counted, because an attack needs something that is not here")
    if (memory := cost.get("memory")) is not None:
        sizes = {what: gigabytes(size) for what, size in memory.items()}
        text.append(
            f"memory: {sizes['training']} at the peak of training ({sizes['state']} between updates, {sizes['attack']} "
            f"in the attack, {sizes['update']} in the rest of an update), {sizes['evaluation']} in an evaluation, not "
            "counting the overhead of CUDA and its allocator"
        )
    return [*text, *found.remarks]


def _counts(passes: dict[str, float]) -> str:
    """Numbers of passes in words, such as ``11 forward and 11 backward passes``."""
    forward, backward = passes["forward"], passes["backward"] + passes["whole"]
    return " and ".join(
        f"{count:,.0f} {name}" if count >= 100 else f"{count:.3g} {name}"
        for count, name in ((forward, "forward"), (backward, "backward passes"))
    )
