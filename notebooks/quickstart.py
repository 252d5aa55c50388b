# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# Renders a few sweets on a conveyor belt, teaches one model two of them and then a third, and looks at what it sees as
# defective. Three minutes on 2 CPU cores or so; a GPU is used where there is one.

# %% tags=["install"]
# The package, where it is not installed yet: from the repository this notebook lies in, or by its name.
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("iumad_jax") is None:
    source = ".." if pathlib.Path("../pyproject.toml").exists() else "iumad-jax"
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", source])

# %% tags=["parameters"]
workdir = "runs/notebook"
objects = "CandyCane,GummyBear,Marshmallow"
epochs, images, pixels = 20, 24, 256
size = 224  # pixels that the network sees; its tokens are of 16 x 16

# %% [markdown]
# ## The experiment
#
# `configs.paper` has the paper's values, `configs.small` what suits few images and any machine. The protocol `2-1`
# learns two objects first and then one more. Every key is explained in `iumad_jax/config.py`.

# %%
from iumad_jax import config as configs

config = configs.small("2-1")
config.dataset.name = "candies"
config.dataset.root = f"{workdir}_candies"
config.dataset.objects = objects
config.dataset.render.update(train=images, test=2 * images // 3, size=pixels)  # every second test image has a defect
config.input.size = size
config.backbone.grid = size // 16
config.train.epochs = epochs

# %% [markdown]
# ## The run
#
# It renders what is missing, learns and evaluates step by step, and keeps everything in the workdir: run the cell
# again, and it goes on where it stopped, or says that it is finished.

# %%
from pathlib import Path

from iumad_jax import experiment

results = experiment.run(config, Path(workdir))

# %% [markdown]
# ## What it learned, and what it forgot
#
# `feature_norm` and `nearest_neighbours` are not trained. What does not beat these baselines has not shown anything.

# %%
from IPython.display import HTML, Image, Markdown, display

from iumad_jax.report import tables

display(Markdown(tables.markdown(results).split("\n## ")[0]))

# %% [markdown]
# ## What it looks at
#
# From left to right: the image, its depth as a relief, the true defect, the anomaly map, and the map over the image.

# %%
last = len(results["steps"]) - 1
for name in results["objects"]:
    display(Image(filename=f"{workdir}/pictures/step{last}_{name}.jpg", width=900))

# %% [markdown]
# ## The report
#
# `report.html` holds all of it in one file that needs no network: every metric, curves, and samples with a threshold to
# play with. In Colab it is under Files, to download; elsewhere this link opens it.

# %%
HTML(f'<a href="{workdir}/report.html" target="_blank">{workdir}/report.html</a>')
