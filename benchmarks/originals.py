"""The published packages of the unseen attacks, made to run with current torch and without CUDA.

``perceptual-advex`` (whose attacks need ``recoloradv`` and ``advex-uar``) dates from 2021 and imports modules that are
not used here; placeholders stand in for them. ``advex-uar`` moves tensors to CUDA in every call; :class:`OnCPU` keeps
them on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rome.attacks import JPEG, LPA, PPGD, Attack, Elastic, Fog, Gabor, ReColorAdv, Snow, SparseFool, StAdv
from rome.attacks.perceptual.features import feature_layers
from rome.attacks.transforms.base import SignAscent

UAR: dict[type[Attack], str] = {Elastic: "elastic", Fog: "fog", Gabor: "gabor", JPEG: "jpeg_linf", Snow: "snow"}
"""Names of the attacks in advex-uar."""
NEVER_CALLED = ("robustness", "wandb", "torchvision.models.utils", "perceptual_advex.datasets")


class _Placeholder(types.ModuleType):
    """A placeholder module in which every name is a class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return nn.Module


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports placeholders for the modules in :data:`NEVER_CALLED`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == one or name.startswith(f"{one}.") for one in NEVER_CALLED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def original(name: str) -> Any:
    """Import a module of the published packages.

    Raises:
        ImportError: its package is not installed.
    """
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)


class OnCPU(TorchFunctionMode):
    """Context in which CUDA calls stay on the CPU. Optionally repairs three defects of the originals.

    Args:
        corners: ``grid_sample`` aligns corners, as in the torch version that the code was written for.
        roll: rolls by two become rolls by one, as diamond-square needs (fog).
        fresh: setting ``requires_grad`` clears the tensor's old gradient (Newton's projection would otherwise add up
            the gradients of all its steps).
    """

    def __init__(self, *, corners: bool = False, roll: bool = False, fresh: bool = False) -> None:
        super().__init__()
        self.corners, self.roll, self.fresh = corners, roll, fresh

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is F.grid_sample and self.corners:
            kwargs["align_corners"] = True
        if func is torch.roll and self.roll and args[1] == 2:
            args = (args[0], 1, *args[2:])
        if self.fresh and func == torch.Tensor.requires_grad.__set__:  # type: ignore[attr-defined]
            args[0].grad = None
        return func(*args, **kwargs)


class Seen(nn.Module):
    """A network with perceptual-advex's interface: ``features`` returns the activations that our distance compares."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.layers = network, feature_layers(network)

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        found: dict[str, Tensor] = {}
        modules = dict(getattr(self.network, "backbone", self.network).named_modules())

        def keep(module: nn.Module, args: Any, output: Tensor, name: str) -> None:
            found[name] = output.clone()  # the next layer may work in place

        handles = [modules[name].register_forward_hook(partial(keep, name=name)) for name in self.layers]
        self.network(x)
        for handle in handles:
            handle.remove()
        return tuple(found[name] for name in self.layers)


def published(
    model: nn.Module, attack: Attack, network: nn.Module, bound: float
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the published attack with the settings of ours, a function of images and labels; it also runs on a CPU.

    Args:
        network: network of PPGD's and LPA's distance.
        bound: bound of PPGD and LPA; the other attacks have their own.

    Returns:
        A function from images and labels to adversarial images; None if there is no package or it is not installed.
    """
    package = "torchattacks" if isinstance(attack, SparseFool) else "perceptual_advex"
    if not installed(package) or not isinstance(attack, (*UAR, StAdv, ReColorAdv, PPGD, LPA, SparseFool)):
        return None
    if isinstance(attack, SparseFool):
        reference = original("torchattacks").SparseFool(
            model, steps=attack.steps, lam=attack.lam, overshoot=attack.overshoot
        )
        reference.deepfool.steps = attack.deepfool_steps
        return lambda x, y: reference(x, y).detach()
    wrappers, perceptual = original("perceptual_advex.attacks"), original("perceptual_advex.perceptual_attacks")
    if isinstance(attack, SignAscent):
        step = attack.default_step() if attack.step_size is None else attack.step_size
        make = partial(wrappers.UARAttack, model, "cifar", UAR[type(attack)], attack.bound, attack.steps, step)
    elif isinstance(attack, (StAdv, ReColorAdv)):
        kind = wrappers.StAdvAttack if isinstance(attack, StAdv) else wrappers.ReColorAdvAttack
        make = partial(kind, model, bound=attack.bound, num_iterations=attack.steps, lr=attack.lr)
    else:
        kind = perceptual.PerceptualPGDAttack if isinstance(attack, PPGD) else perceptual.LagrangePerceptualAttack
        more = {"cg_iterations": attack.iterations} if isinstance(attack, PPGD) else {"binary_steps": attack.rounds}
        same = {"bound": bound, "num_iterations": attack.steps, "h": attack.h, "lpips_model": Seen(network)}
        make = partial(kind, model, **same, **more)

    def run(x: Tensor, y: Tensor) -> Tensor:
        with OnCPU() if x.device.type == "cpu" else nullcontext():
            return make()(x.clone(), y).detach()

    return run
