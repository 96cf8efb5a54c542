"""
What attacks do to an image
===========================

One model, three balls, one batch: L1, L2 and Linf perturbations side by side, and the effect of more attack steps.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import rome

# %%
# A model trained on clean digits only: all of its epochs are natural.

config = rome.load("experiments/digits/random.yaml", ["epochs=8", "natural_epochs=8"])
model = rome.load_model(rome.train(config, Path(tempfile.mkdtemp()) / "natural").folder).eval()
x, y = config.data.open("test").first(48)
print(f"clean accuracy {(model(x).argmax(1) == y).float().mean():.0%}")

# %%
# An attack is an object without state; called with a model, a batch and a threat, it returns images inside the threat.

attack = rome.PGD(steps=10)
images = {threat.name: attack(model, x, y, threat) for threat in rome.DIGITS}
for name, x_adv in images.items():
    change = (x_adv - x).flatten(1)
    accuracy = (model(x_adv).argmax(1) == y).float().mean()
    print(
        f"{name:>4}: {accuracy:4.0%} correct; mean size in L1 {change.norm(1, 1).mean():.2f}, "
        f"L2 {change.norm(2, 1).mean():.2f}, Linf {change.abs().amax(1).mean():.2f}"
    )

# %%
# L1 perturbations change a few pixels by a lot, Linf perturbations change all pixels by a little.

figure, axes = plt.subplots(3, 4, figsize=(6, 4.6), layout="constrained")
for row, (name, x_adv) in zip(axes, images.items(), strict=True):
    for axis, (picture, title) in zip(
        row,
        [(x[0], "image"), (x_adv[0], name), (x_adv[0] - x[0], "change"), ((x_adv[0] - x[0]) != 0, "changed pixels")],
        strict=True,
    ):
        axis.imshow(
            picture[0],
            cmap="gray" if title in ("image", name) else "coolwarm",
            vmin=-1 if title == "change" else 0,
            vmax=1,
        )
        axis.set_title(title, fontsize=8)
        axis.axis("off")
plt.show()

# %%
# A batch may mix threats: example i is attacked under the threat ``labels[i]``. One forward and one backward pass per
# step serve all threats.

labels = torch.arange(len(x)) % 3
mixture = rome.PerExample(tuple(rome.DIGITS), labels)
mixed = attack(model, x, y, mixture)
for i, name in enumerate(images):
    print(name, f"{(model(mixed[labels == i]).argmax(1) == y[labels == i]).float().mean():.0%} correct")

# %%
# More steps make an attack stronger, up to a point. A model is only as robust as the strongest attack shows, so a
# robust accuracy without its attack means little.

steps = [1, 2, 5, 10, 20, 50]
plt.figure(figsize=(5, 2.8), layout="constrained")
for kind in (rome.PGD, rome.APGD):
    accuracies = [
        100 * (model(kind(steps=n)(model, x, y, rome.DIGITS["L2"])).argmax(1) == y).float().mean() for n in steps
    ]
    plt.plot(steps, accuracies, marker="o", label=kind.kind)
plt.xscale("log")
plt.xlabel("steps")
plt.ylabel("accuracy under L2, %")
plt.legend()
plt.show()
