"""BatchNorm folded into convolutions: the same function, whatever the model, and everything in its place afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from helpers.problems import rest_slow
from rome import evaluate
from rome.experts import MixtureConv2d, add_experts
from rome.models.backbones.resnet import preact_resnet_18, resnet_18
from rome.models.backbones.wide_resnet import wide_resnet
from rome.models.folding import foldable, folded
from rome.threats import LpBall


def normalised(model: nn.Module) -> nn.Module:
    """In evaluation mode, each BatchNorm with statistics and weights of its own."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, lowest in (
                (layer.running_var, 0.5),
                (layer.weight, 0.5),
                (layer.running_mean, -1.0),
                (layer.bias, -1.0),
            ):
                if tensor is not None:
                    nn.init.uniform_(tensor, lowest, 1.5)
    return model.eval()


class Block(nn.Module):
    """A convolution and its BatchNorm, with something of each test's own behind them."""

    def __init__(self, behind: Callable[[Block, Tensor, Tensor], Tensor] = lambda _, read, found: found) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head, self.behind = nn.Linear(8, 4), behind

    def forward(self, x: Tensor) -> Tensor:
        read = self.convolution(x)
        return self.head(self.behind(self, read, self.norm(read)).mean((2, 3)))


def with_experts(form: str) -> nn.Module:
    model = add_experts(resnet_18(width=8), rank=2, conv=form)
    for layer in model.modules():
        if isinstance(layer, MixtureConv2d):
            nn.init.normal_(layer.B, std=0.1)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "convolution with a bias": (Block, 1),
    "resnet_18": (lambda: resnet_18(width=8), 20),
    "wide_resnet": (lambda: wide_resnet(depth=10, width=1), 3),
    "preact_resnet_18": (lambda: preact_resnet_18(width=8), 8),
    "timm's resnet18": (lambda: timm.create_model("resnet18", num_classes=10), 20),
    "activation behind the norm": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=10), 34),
    "before the convolution": (lambda: timm.create_model("densenet121", num_classes=10, block_config=(1, 1, 1, 1)), 5),
    "experts": (lambda: with_experts("loralib"), 20),
    "experts as in peft": (lambda: with_experts("peft"), 20),
    "no BatchNorm": (lambda: timm.create_model("convnext_atto", num_classes=10), 0),
}


@pytest.mark.parametrize("name", rest_slow(list(MODELS), 4))
def test_a_folded_model_is_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    make, count = MODELS[name]
    model = normalised(make()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(3, 3, 32, 32)
    before, state = (
        model(x),
        {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()},
    )
    folds = foldable(model, x[:2])
    assert len(folds) == count
    with folded(folds):
        other = torch.rand(3, 3, 32, 32).requires_grad_()
        folded_answer = model(other)
        (gradient,) = torch.autograd.grad(folded_answer.sum(), other)
        assert all(fold.norm(x) is x for fold in folds if type(fold.norm) is nn.BatchNorm2d)
    answer = model(other)
    torch.testing.assert_close(folded_answer, answer, rtol=1e-3, atol=1e-4 * float(answer.detach().abs().max()))
    (expected,) = torch.autograd.grad(answer.sum(), other)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in state.items())
    assert torch.equal(model(x), before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def twice(block: Block, _: Tensor, found: Tensor) -> Tensor:
    return block.norm(found)


UNFIT: dict[str, Callable[[Block, Tensor, Tensor], Tensor]] = {
    "somebody else reads the convolution": lambda _, read, found: found + read,
    "and a view of it": lambda _, read, found: found + read[:, :1],
    "the norm is called twice": twice,
    "the weights are read elsewhere": lambda block, _, found: found + block.convolution.weight.sum(),
}


@pytest.mark.parametrize("behind", UNFIT)
def test_what_would_be_another_function_stays_as_it_is(behind: str) -> None:
    assert foldable(normalised(Block(UNFIT[behind])), torch.rand(2, 3, 8, 8)) == []


def test_what_normalises_by_its_batch_or_has_hooks_stays_as_it_is() -> None:
    x = torch.rand(2, 3, 8, 8)
    for change in (
        lambda block: block.norm.train(),
        lambda block: setattr(block, "norm", nn.BatchNorm2d(8, track_running_stats=False)),
        lambda block: block.convolution.register_forward_hook(lambda *_: None),
        lambda block: block.norm.register_forward_pre_hook(lambda *_: None),
        lambda block: nn.utils.parametrizations.weight_norm(block.convolution),
        lambda block: block.compile(backend="eager"),
    ):
        model = normalised(Block())
        change(model)
        assert foldable(model, x) == []
    assert foldable(lambda x: x.flatten(1), x) == []


class Noticing(Block):
    """Remembers at each call whether its norm was folded."""

    noticed: list[bool]

    def forward(self, x: Tensor) -> Tensor:
        self.noticed.append("forward" in self.norm.__dict__)
        return super().forward(x)


def test_an_evaluation_attacks_the_folded_model_and_judges_by_the_model_itself() -> None:
    model = Noticing()
    model.noticed = []
    normalised(model)
    x = torch.rand(4, 3, 8, 8)
    y = model(x).argmax(1)
    evaluate(
        model,
        x,
        y,
        threats=LpBall(norm="Linf", eps=0.1),
        suite={"kind": "apgd", "iterations": 5},
        batch_size=4,
        checks=False,
    )
    in_order = [noticed for noticed, _ in itertools.groupby(model.noticed)]
    assert in_order == [False, True] * (len(in_order) // 2) + [False]
    assert model.noticed.count(True) > 10


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = normalised(Block())
    x = torch.rand(2, 3, 8, 8)
    before, folds = model(x), foldable(model, x)
    with pytest.raises(RuntimeError, match="in the middle"), folded(folds):
        raise RuntimeError("in the middle")
    assert torch.equal(model(x), before)
