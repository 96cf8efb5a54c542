"""Building a backbone by name: from timm, :mod:`rome.models.backbones`, RobustBench or a function of the user's."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from rome.core.errors import UserError, did_you_mean, first_line
from rome.core.trust import import_own, names_code
from rome.models.backbones import BACKBONES, IDENTITY, Normalization
from rome.models.hub import on_hub

ROBUSTBENCH = "robustbench:"
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
"""RobustBench's data sets and their numbers of classes."""
TWINS = {
    ("cifar10", "Gowal2020Uncovering_28_10_extra"): "wide_resnet_28_10",
    ("cifar10", "Bartoldson2024Adversarial_WRN-94-16"): "wide_resnet_94_16",
    ("imagenet", "Debenedetti2022Light_XCiT-S12"): "xcit_small_12_p16_224",
}
"""Architectures of the RobustBench models in the paper, under their names in rome or timm."""
THREATS = ("Linf", "L2", "corruptions", "corruptions_3d")
"""RobustBench's threat models."""


def make_backbone(
    name: str, num_classes: int, in_chans: int, options: dict[str, Any], *, pretrained: bool
) -> nn.Module:
    """Build the module that a model's name stands for; see :func:`rome.create_model`.

    Raises:
        UserError: the name is unknown, or its weights cannot be loaded.
        Exception: whatever the builder raises for invalid arguments.
    """
    if on_hub(name):
        raise UserError(
            f"{name} is a model with weights: rome.load_model({name!r}) loads it, rome evaluate {name} evaluates "
            f"it, and model.weights={name} with its architecture as model.name trains from it"
        )
    if name.startswith(ROBUSTBENCH):
        return robustbench_model(name.removeprefix(ROBUSTBENCH), num_classes=num_classes, **options)
    if pretrained and (names_code(name) or name in BACKBONES):
        raise UserError(
            f"model.pretrained is for timm's models, not {name}; give its weights (model.weights, --weights)"
        )
    if names_code(name):
        place = name.rpartition(":")[0]
        with neighbours(Path(place).resolve().parent) if place.endswith(".py") else nullcontext():
            module: nn.Module = own_function(name)(num_classes=num_classes, **options)
            return module
    if name in BACKBONES:
        return BACKBONES[name](num_classes=num_classes, in_chans=in_chans, **options)
    import timm  # takes a second, for which reading a config need not wait

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*BACKBONES, *timm.list_models()], n=8, cutoff=0.5)
        hint = did_you_mean(name, near) if near else " `rome list models` (timm.list_models()) lists all."
        raise UserError(f"unknown model {name!r}.{hint}")
    return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **options)


def expected_normalization(backbone: nn.Module) -> Normalization:
    """Normalisation that a backbone expects: its ``normalization``, that in timm's ``pretrained_cfg``, or 0.5."""
    known = getattr(backbone, "normalization", None)
    if known is not None:
        return Normalization(*known)
    config = getattr(backbone, "pretrained_cfg", None) or {}
    return Normalization(tuple(config.get("mean", (0.5,))), tuple(config.get("std", (0.5,))))


def robustbench_model(
    name: str, *, num_classes: int, dataset: str = "cifar10", threat_model: str = "Linf", model_dir: str = "models"
) -> nn.Module:
    """Load a model of RobustBench's zoo, with its own normalisation (Croce et al. 2021, arXiv:2010.09670).

    Args:
        name: as in the leaderboard, such as ``Gowal2020Uncovering_28_10_extra``.
        num_classes: must be the data set's number of classes.
        dataset: ``cifar10``, ``cifar100`` or ``imagenet``.
        threat_model: ``Linf``, ``L2``, ``corruptions`` or ``corruptions_3d``.
        model_dir: RobustBench's folder for downloads: ``model_dir/cifar10/Linf/NAME.pt``.

    Raises:
        UserError: the package is missing, it has no such model, or the weights cannot be downloaded.
    """
    for key, value, valid in (("dataset", dataset, CLASSES), ("threat_model", threat_model, THREATS)):
        if value not in valid:
            raise UserError(f"RobustBench has no {key} {value!r}.{did_you_mean(value, valid)}")
    if num_classes != CLASSES[dataset]:
        raise UserError(
            f"RobustBench's {name} has {dataset}'s {CLASSES[dataset]} classes, not {num_classes}; to start from it "
            "anyway, set model.name to its architecture, model.weights to its file, and model.drop_head=true"
        )
    try:
        from robustbench.utils import load_model
    except ImportError as error:
        raise UserError(
            f"models named robustbench:... need the package robustbench ({first_line(error)}): "
            'pip install git+https://github.com/RobustBench/robustbench "setuptools<81" '
            "(the release on PyPI wants an older timm)"
        ) from error
    options = {"dataset": dataset, "threat_model": threat_model, "model_dir": model_dir}
    try:
        with redirect_stdout(sys.stderr):  # it prints download progress
            model: nn.Module = load_model(model_name=name, **options)
    except KeyError as error:
        raise UserError(
            f"RobustBench has no model {first_line(error)} for {dataset} and {threat_model}; "
            "its names are listed at https://robustbench.github.io"
        ) from error
    except Exception as error:  # downloads fail in many ways: no network, quotas, a page instead of a file
        raise UserError(
            f"RobustBench cannot load {name}: {first_line(error)}; you can put its file at "
            f"{Path(model_dir) / dataset / threat_model / name}.pt"
        ) from error
    object.__setattr__(model, "normalization", IDENTITY)
    return model


def own_function(name: str) -> Any:
    """Import the function that ``path.py:function`` or ``package.module:function`` names.

    Raises:
        UserError: the function does not exist, or its module cannot be imported.
    """
    place, _, function = name.rpartition(":")
    try:
        module = _execute(Path(place)) if place.endswith(".py") else import_own(place)
        if not hasattr(module, function):
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            raise UserError(f"{place} has no function {function!r}.{did_you_mean(function, own)}")
        return getattr(module, function)
    except UserError:
        raise
    except Exception as error:  # the file can raise anything
        raise UserError(f"model {name!r} cannot be imported: {type(error).__name__}: {first_line(error)}") from error


_IMPORTED: dict[str, ModuleType] = {}
"""Modules in the folder of the user's latest file that it imported, by name."""


@contextmanager
def neighbours(folder: Path) -> Iterator[None]:
    """Make the modules in a folder importable while the context is open, as for a script in that folder.

    Like the file itself, they are executed anew, so neither an earlier version nor a module of the same name in another
    file's folder is used. Afterwards they are in ``sys.modules``, where their code can be found.

    Raises:
        UserError: a module of the same name was already imported from elsewhere.
    """
    for name, module in _IMPORTED.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _IMPORTED.clear()
    own = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/*.py")}
    own -= sys.stdlib_module_names
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in own}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        _IMPORTED.update((name, module) for name, module in sys.modules.items() if name.partition(".")[0] in own)
        sys.modules.update(aside)
    for name in sorted(aside.keys() & _IMPORTED.keys()):
        other = getattr(aside[name], "__file__", None) or "another module"
        if other != _IMPORTED[name].__file__:
            raise UserError(
                f"the module {name} in {folder} has the same name as {other}, which is already imported; rename it"
            )


def _execute(file: Path) -> ModuleType:
    """Execute a file as a new module.

    The module is added to ``sys.modules`` under a unique name, since dataclasses, for example, look up a class's module
    there.
    """
    name = f"{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
