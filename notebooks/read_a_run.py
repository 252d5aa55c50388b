# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading a finished run
#
# ![curves of the test images of an object](pictures/read_a_run.jpg)
#
# The files in a workdir are made for other programs: `results.json`, `ledger.jsonl`, `results.csv`, and `samples/` with
# the score of every test image. This notebook reads and plots them.
#
# On Colab, upload or clone the repository, open this notebook in it, and choose a runtime. The next cell installs JAX
# for a GPU if there is one. For a TPU, run `pip install "jax[tpu]"` first, which was not tried.

# %% tags=["install"]
# Installs the package if it is missing: from this notebook's repository, else by its name.
import importlib.util
import pathlib
import shutil
import subprocess
import sys

if importlib.util.find_spec("iumad_jax") is None:
    source = ".." if pathlib.Path("../pyproject.toml").exists() else "iumad-jax"
    extra = "[cuda12]" if shutil.which("nvidia-smi") else ""
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", source + extra])

# %% tags=["parameters"]
workdir = "runs/notebook"  # workdir of a finished run, such as the quickstart's

# %% [markdown]
# If the workdir has no results, this cell makes the smallest run: two sweets and a method without training.

# %%
from pathlib import Path

from iumad_jax import config as configs
from iumad_jax import experiment
from iumad_jax.data import candies

if not (Path(workdir) / "results.json").exists():
    config = configs.paper("1-1")
    config.method = "memory_bank"
    config.dataset.name = "eyecandies"  # rendered sweets are stored like the images of Eyecandies
    config.dataset.root = f"{workdir}_candies"
    config.dataset.objects = "CandyCane,GummyBear"
    candies.render(config.dataset.root, objects=config.dataset.objects, train=6, test=6, size=64)
    config.input.size, config.backbone.grid = 64, 4
    experiment.run(config, Path(workdir))

# %% [markdown]
# ## The results
#
# `matrix[metric][step][object]` is null before the step that learned the object; `baselines` has the matrices of
# the methods without training.

# %%
import json

import matplotlib.pyplot as plt
import numpy as np

results = json.loads((Path(workdir) / "results.json").read_text())
methods = {results["config"]["method"]: results, **results["baselines"]}
print("objects:", *results["objects"])
for name, method in methods.items():
    for metric in ("i_auroc", "aupro"):
        print(
            f"{name:20} {metric:8}",
            {key: value and round(value, 3) for key, value in method["summary"][metric].items()},
        )

# %%
figure, axes = plt.subplots(1, len(methods), figsize=(4 * len(methods), 3), sharey=True, squeeze=False)
for axis, (name, method) in zip(axes[0], methods.items(), strict=True):
    matrix = np.array(method["matrix"]["i_auroc"], float)
    axis.plot(matrix, "o-", color="0.7", linewidth=1)
    axis.plot(np.nanmean(matrix, axis=1), "o-", linewidth=3)
    axis.set(title=name, xlabel="step", xticks=range(len(matrix)))
axes[0][0].set_ylabel("I-AUROC per object, and mean")
plt.show()

# %% [markdown]
# ## The ledger
#
# One event per line, in order. On a CPU, two runs with the same seed write identical ledgers.

# %%
from iumad_jax.runtime import ledger

events = ledger.read(Path(workdir) / "ledger.jsonl")
epochs = [event for event in events if event["event"] == "epoch"]
if epochs:
    plt.semilogy([event["loss"] for event in epochs])
    plt.xlabel("epochs of all steps")
    plt.ylabel("loss")
print(len(events), "events, of which", len(epochs), "are epochs")

# %% [markdown]
# ## Test images
#
# `samples/` has the scores, curves and small anomaly maps of all test images after every step. These are the results of
# the first object after the last step.

# %%
from iumad_jax.report import samples

name, last = results["objects"][0], len(results["steps"]) - 1
summary = samples.load(Path(workdir), last, name)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for method, scores in summary.scores.items():
    order = np.argsort(-scores)
    left.plot(np.cumsum(~summary.anomalous[order]), np.cumsum(summary.anomalous[order]), label=method)
    right.plot(samples.RATES, summary.overlap[method], label=method)
left.set(title=f"{name}: images", xlabel="false alarms", ylabel="detected anomalous images")
right.set(title=f"{name}: pixels", xlabel="false positive rate", ylabel="mean overlap with a defect")
right.legend()
plt.show()

# %%
worst = np.argsort(-summary.scores[results["config"]["method"]])[:6]
figure, axes = plt.subplots(1, len(worst), figsize=(2 * len(worst), 2.4))
for axis, row in zip(axes, worst, strict=True):
    axis.imshow(summary.maps[row], "inferno", vmin=0, vmax=255)
    axis.set(title=f"{summary.defects[row]} {summary.ids[row]}", xticks=[], yticks=[])
figure.suptitle("Highest scores")
plt.show()
