"""
Train, attack, read the result
==============================

Train a small vision transformer on digits under L1, L2 and Linf perturbations (RANDOM), then attack it under each.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import rome

# %%
# A config determines a run. Those that come with rome are under ``experiments/``, and any key can be changed. This run
# is shorter than the original, which trains for 26 epochs: six epochs on clean images, then four under attack.

config = rome.load("experiments/digits/random.yaml", ["epochs=10", "natural_epochs=6", "attack.steps=2"])
for threat in config.threats:
    print(threat)

# %%
# Training writes the config, a log and the weights to a folder, here a temporary one.

folder = Path(tempfile.mkdtemp()) / "random"
run = rome.train(config, folder)
print(sorted(file.name for file in folder.iterdir()))

# %%
# The accuracy on the training batches drops when adversarial training begins, because the task gets harder.

epochs = [line for line in run.log() if line["event"] == "epoch"]
plt.figure(figsize=(5, 2.8), layout="constrained")
plt.plot(
    [line["epoch"] for line in epochs],
    [100 * sum(line["accuracy"].values()) / len(line["accuracy"]) for line in epochs],
    marker="o",
)
plt.axvline(config.natural_epochs + 0.5, color="gray", linestyle="--")
plt.xlabel("epoch (adversarial to the right of the line)")
plt.ylabel("training accuracy, %")
plt.show()

# %%
# Now 60 test images are attacked by APGD-CE and then APGD-T in each ball. ``correct`` is a boolean matrix of examples
# and cases, from which all numbers are derived.

model = rome.load_model(folder).eval()
split = config.data.open("test")
x, y = split.first(60)
report = rome.evaluate(model, x, y, threats=rome.DIGITS, suite="apgd", checks=False)
print(report.cases, report.correct.shape)
for name in ("clean", *report.robust, "union"):
    value = {"clean": report.clean, "union": report.union, **report.robust}[name]
    low, high = report.interval(name)
    print(f"{name:>6} {100 * value:5.1f}%   95% interval {100 * low:.1f} to {100 * high:.1f}")

# %%
# The union is the share of rows that are true in every column. It cannot exceed the mean of any column; the further it
# is below the smallest, the more the threats differ in the examples they break.

print(report.correct.all(axis=1).mean() == report.union, report.union <= min(report.robust.values()))
