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
# ![six columns: photograph, relief, true defect, anomaly map, and the map over both](pictures/quickstart.jpg)
#
# Render a few sweets on a conveyor belt, train one model on two of them and then on a third, and look at the defects
# that it detects.
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
workdir = "runs/notebook"
objects = "CandyCane,GummyBear,Marshmallow"
epochs, images, pixels = 10, 12, 192
size = 128  # input size of the network in pixels; a token covers 16 x 16

# %% [markdown]
# ## The images
#
# They are stored like those of Eyecandies. Every second test image has a defect.

# %%
from iumad_jax.data import candies

candies.render(f"{workdir}_candies", objects=objects, train=images, test=2 * images // 3, size=pixels)

# %% [markdown]
# ## The experiment
#
# `configs.paper` has the paper's values; `configs.small` suits few images and small machines. The protocol `2-1` learns
# two objects in the first step and one more in the second. Every key is explained in `iumad_jax/config.py`.

# %%
from iumad_jax import config as configs

config = configs.small("2-1")
config.dataset.name = "eyecandies"
config.dataset.root = f"{workdir}_candies"
config.dataset.objects = objects
config.input.size = size
config.backbone.grid = size // 16
config.train.epochs = epochs
config.baselines = "memory_bank"  # evaluated on the same images

# %% [markdown]
# ## The run
#
# The run learns and evaluates step by step, and stores everything in the workdir. Running the cell again resumes an
# interrupted run, or reports that the run is finished.

# %%
from pathlib import Path

from iumad_jax import experiment

results = experiment.run(config, Path(workdir))

# %% [markdown]
# ## Learning and forgetting
#
# The baseline `memory_bank` is not trained. A trained method is useful only if it beats the baseline.

# %%
from IPython.display import HTML, Image, Markdown, display

from iumad_jax.report import tables

display(Markdown(tables.markdown(results).split("\n## ")[0]))

# %% [markdown]
# ## Anomaly maps
#
# From left to right: the image, its depth as a relief, the true defect, the anomaly map, and the map over the image.

# %%
last = len(results["steps"]) - 1
for name in results["objects"]:
    display(Image(filename=f"{workdir}/pictures/step{last}_{name}.jpg", width=900))

# %% [markdown]
# ## The report
#
# `report.html` is a single file that needs no network: every metric, curves, and test images with an adjustable
# threshold. This link opens it; in Colab, download it from Files instead.

# %%
HTML(f'<a href="{workdir}/report.html" target="_blank">{workdir}/report.html</a>')
