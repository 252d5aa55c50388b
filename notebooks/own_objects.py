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
# # Your own objects
#
# ![anomaly maps of drawn washers](pictures/own_objects.jpg)
#
# Train a model on images of your own objects, with or without depth: put good images into folders, train, and look at
# the anomaly maps. This notebook draws its images, so that it runs without any data; put yours into the same folders.
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
root = "data/objects"  # one folder per object
workdir = "runs/own_objects"
epochs, images, pixels = 10, 12, 192
size = 128  # input size of the network in pixels; a token covers 16 x 16

# %% [markdown]
# ## The folders
#
# ```
# data/objects/washer/train/good/rgb/000.png      good images for training
# data/objects/washer/train/good/depth/000.tiff   their depth in metres, NaN where missing; optional
# data/objects/washer/val/good/rgb/000.png        good images for the thresholds; optional
# data/objects/washer/test/good/rgb/000.png       test images: good ones
# data/objects/washer/test/notch/rgb/000.png      and every kind of defect
# data/objects/washer/test/notch/mask/000.png     with masks, 0 where good; optional
# ```

# %%
from pathlib import Path

import numpy as np
from PIL import Image


def draw(shape, seed, anomalous):
    """Draw an object on a belt half a metre below the camera; return RGB, depth in metres and defect mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:pixels, :pixels] / pixels - 0.5 + rng.uniform(-0.05, 0.05, (2, 1, 1))
    radius, angle = np.hypot(x, y), np.arctan2(y, x) + rng.uniform(0, 6)
    body = {
        "washer": (radius < 0.3) & (radius > 0.12),
        "gear": radius < 0.26 + 0.03 * np.cos(8 * angle),
        "star": radius < 0.24 + 0.08 * np.cos(5 * angle),
    }[shape]
    mask = np.zeros_like(body)
    if anomalous:
        mask = body & (np.hypot(x - 0.2 * np.cos(seed), y - 0.2 * np.sin(seed)) < 0.06)
    colour = np.array({"washer": [180, 180, 190], "gear": [190, 140, 60], "star": [150, 60, 60]}[shape])
    rgb = np.where((body & ~mask)[..., None], colour, (60, 70, 60)) + rng.normal(0, 4, (pixels, pixels, 3))
    depth = 0.5 - 0.02 * (body & ~mask) + rng.normal(0, 2e-4, body.shape)
    return rgb.clip(0, 255).astype(np.uint8), depth.astype(np.float32), mask


def save(folder, number, rgb, depth, mask=None):
    """Save the files of one image."""
    for kind, array, suffix in (("rgb", rgb, "png"), ("depth", depth, "tiff"), ("mask", mask, "png")):
        if array is not None:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / kind / f"{number:03}.{suffix}")


for shape, defect in (("washer", "notch"), ("gear", "dent")):
    for number in range(images):
        save(Path(root) / shape / "train" / "good", number, *draw(shape, number, False)[:2])
    for number in range(8):
        save(Path(root) / shape / "val" / "good", number, *draw(shape, 1000 + number, False)[:2])
        save(Path(root) / shape / "test" / "good", number, *draw(shape, 2000 + number, False)[:2])
        save(Path(root) / shape / "test" / defect, number, *draw(shape, 3000 + number, True))

# %% [markdown]
# ## Learning the objects one after the other
#
# Without depth, set `config.modality = "rgb"`. Every key is explained in `iumad_jax/config.py`.

# %%
from iumad_jax import config as configs
from iumad_jax import experiment

config = configs.small("1-1")
config.dataset.name = "folder"
config.dataset.root = root
config.dataset.objects = "washer,gear"  # in the order of learning
config.input.size = size
config.backbone.grid = size // 16
config.train.epochs = epochs
config.baselines = "memory_bank"  # evaluated on the same images

results = experiment.run(config, Path(workdir))

# %% [markdown]
# ## Anomaly maps

# %%
from IPython.display import Image as Picture
from IPython.display import Markdown, display

from iumad_jax.report import tables

display(Markdown(tables.markdown(results).split("\n## ")[0]))
for name in results["objects"]:
    display(Picture(filename=f"{workdir}/pictures/step1_{name}.jpg", width=900))

# %% [markdown]
# `report.html` in the workdir shows the best, the median and the worst images of every kind, with an adjustable
# threshold. `python -m iumad_jax.predict` predicts new images; iumad_jax/inference/README.md explains it.
#
# ## The next object
#
# A run goes on learning, from arrays as well: `learn` writes them into the run's folder and adds a step. Here, stars
# arrive. They have no test images, so the line that `learn` returns tells only what became of the others.

# %%
import iumad_jax

run = iumad_jax.open_run(workdir)
new = [draw("star", number, False) for number in range(images)]
print(run.learn("star", [rgb for rgb, _, _ in new], [depth for _, depth, _ in new]))

# %% [markdown]
# The detector of the run now recognises stars, and judges the others as before.

# %%
for shape in ("washer", "gear", "star"):
    for anomalous in (False, True):
        rgb, depth, _ = draw(shape, 4000, anomalous)
        result = run.detector(rgb, depth)
        kind, share = "anomalous" if anomalous else "good", result.score / result.image_threshold
        print(f"{kind} {shape}: taken for {result.object}, score {share:.2f} of the threshold")
display(Markdown(run.history()))

# %% [markdown]
# `run.learn(..., update=True)` learns further images of an object, such as false alarms; `run.calibrate` sets its
# thresholds anew, and after `run.retire` an object is no longer recognised.
