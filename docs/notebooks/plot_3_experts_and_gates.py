"""
Experts, and how gates route threats
====================================

Add low-rank experts to the layers of a model, train them, and look at their gates: do they distinguish the threats?
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import rome

# %%
# Experts can be added to any model with Linear or square convolutional layers. New experts leave the model's function
# unchanged, because the second factor of each low-rank update starts at zero.

size = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4}
plain = rome.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1, **size).eval()
images = torch.rand(4, 1, 8, 8)
before = plain(images)
rome.add_experts(plain, experts=4, rank=16, images=images)
print(torch.equal(before, plain(images)), f"{sum(p.numel() for p in plain.parameters()):,} parameters now")

# %%
# RoME+RANDOM, shorter than the experiment that comes with rome.

config = rome.load("experiments/digits/rome-random.yaml", ["epochs=10", "natural_epochs=6", "attack.steps=2"])
model = rome.load_model(rome.train(config, Path(tempfile.mkdtemp()) / "rome").folder).eval()

# %%
# ``record_gates`` records the gates of the forward passes inside its context: weights of shape (images, tokens,
# experts) for each layer.

x, y = config.data.open("test").first(64)
groups = {"clean": x} | {threat.name: rome.APGD(steps=10)(model, x, y, threat) for threat in rome.DIGITS}
means = {}
for name, batch in groups.items():
    with rome.record_gates(model) as recorder, torch.no_grad():
        model(batch)
    layer, gates = list(recorder.gates.items())[-1]
    means[name] = gates.weights.mean(dim=(0, 1)).numpy()
print(layer)
for name, mean in means.items():
    print(f"{name:>8}", *(f"{weight:.3f}" for weight in mean))

# %%
# If the bars of an expert do not differ between threats, the gates send all threats to the same experts:
# *threat-agnostic routing*. That is to be expected after such a short training; the routing study in the results shows
# when it changes.

plt.figure(figsize=(5.5, 2.8), layout="constrained")
for i, (name, mean) in enumerate(means.items()):
    plt.bar(np.arange(len(mean)) + 0.2 * i - 0.3, mean, width=0.18, label=name)
plt.xticks(range(4), [f"expert {k + 1}" for k in range(4)])
plt.ylabel("mean gate weight")
plt.ylim(0, 1.2 * max(mean.max() for mean in means.values()))
plt.legend(ncols=4, fontsize=8)
plt.show()

# %%
# The same in numbers. The distance between mean gates ranges from 0 (the same experts) to 1 (disjoint experts).

from rome.report.gates import collect
from rome.report.routing import routing_numbers

numbers = routing_numbers(collect(model, x, y, {threat.name: threat for threat in rome.DIGITS}))
print(f"distance between two threats, last layer: {numbers.between[-1]:.4f}")
print(f"mutual information of threat and expert: {numbers.information[-1]:.4f} bits")
print(f"entropy of a gate: {numbers.entropy[-1]:.3f} of its maximum")
