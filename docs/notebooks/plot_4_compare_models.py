"""
Is one model more robust than another?
======================================

Two models of your own, plain torch modules, evaluated on the same examples; intervals, a paired test, and a model
whose apparent robustness is false.
"""

import torch
from torch import nn

import rome
from rome.data import Digits
from rome.evaluation.statistics import paired_difference

# %%
# Any module will do that takes images in [0, 1] and returns logits. Here are two CNNs; one is trained with noise.

data = Digits()
x, y = data.open("train").first(1200)
test_x, test_y = data.open("test").first(150)


def trained(noise: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(768, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        for rows in torch.randperm(len(x)).split(64):
            seen = (x[rows] + noise * torch.randn_like(x[rows])).clamp(0, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(seen), y[rows]).backward()
            optimizer.step()
    return model.eval()


models = {"plain": trained(0), "noise": trained(0.3)}
threats = {name: rome.LpBall(norm=name, eps=eps) for name, eps in {"L2": 0.6, "Linf": 0.1}.items()}
reports = {name: rome.evaluate(model, test_x, test_y, threats=threats, checks=False) for name, model in models.items()}
for name, report in reports.items():
    low, high = report.interval("union")
    print(f"{name:>5}: clean {report.clean:.1%}, union {report.union:.1%} ({low:.1%} to {high:.1%})")

# %%
# To see whether one is better, compare them on the same examples: how many does only one of them get right?

difference = paired_difference(reports["noise"].all_correct(), reports["plain"].all_correct())
print(
    f"noise - plain: {difference.value:+.1%}, 95% interval {difference.low:+.1%} to {difference.high:+.1%}, "
    f"p = {difference.p:.2g}"
)

# %%
# A model with huge logits: it predicts the same classes as the plain one, but the gradient of the cross-entropy
# vanishes in float32 wherever it is confident. An attack that follows only this gradient is blind.


class Loud(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 1000 * self.inner(images)


loud = Loud(models["plain"]).eval()
probe = test_x.clone().requires_grad_()
(gradient,) = torch.autograd.grad(nn.functional.cross_entropy(loud(probe), test_y, reduction="sum"), probe)
print(f"zero gradients: {(gradient.flatten(1).abs().amax(1) == 0).float().mean():.0%} of the images")

blind = (test_x + threats["Linf"].eps * gradient.sign()).clamp(0, 1)
print(f"accuracy under FGSM on it: {(loud(blind).argmax(1) == test_y).float().mean():.0%}")
report = rome.evaluate(loud, test_x, test_y, threats=threats, checks=False)
print(f"accuracy under rome's attacks: {report.robust['Linf']:.0%}")
print(f"accuracy of the plain model, the same function: {reports['plain'].robust['Linf']:.0%}")
