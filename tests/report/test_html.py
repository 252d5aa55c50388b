"""The page of a run: what it says against the numbers it was made from, read and driven in a real browser."""

import json
import math
import re

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

from iumad_jax.errors import UserError
from iumad_jax.metrics import image_auroc, pro_curve
from iumad_jax.report import html, samples, tables
from iumad_jax.report.ledger import Ledger

EVIL = "</script><img src=x onerror=document.title='evil'>\"'&"
OBJECTS = ["ant", "bee", "cat"]  # the protocol learns the cat and the ant, then the bee
STEPS = [["cat", "ant"], ["bee"]]
SYSTEMS = ("ib_iumad", "feature_norm", "nearest_neighbours")
KINDS = ["good"] * 4 + ["bump"] * 3 + [EVIL] * 2
SIZE = 32
COUNT = 18  # three of each kind but two of the last, and three objects: 3 * (3 + 3 + 2) less...


def truth(name):
    """Red photographs with a green square, a bump of 2 cm on a plane, and defects in the corner."""
    rng = np.random.default_rng(OBJECTS.index(name))
    rgb = np.full((len(KINDS), SIZE, SIZE, 3), (150, 60, 40), np.uint8)
    rgb[:, 8:24, 8:24] = (40, 120, 60)
    depth = np.full((len(KINDS), SIZE, SIZE), 0.5, np.float32)
    depth[:, 8:24, 8:24] = 0.48
    masks = np.zeros((len(KINDS), SIZE, SIZE), bool)
    for row, kind in enumerate(KINDS):
        if kind != "good":
            y, x = rng.integers(4, 20, 2)
            masks[row, y : y + 8, x : x + 8] = True
    return rgb, depth, masks


def predictions(name, step):
    """By system: scores and maps, of which the run's own method sees most."""
    rng = np.random.default_rng([OBJECTS.index(name), step])
    *_, masks = truth(name)
    maps = {
        system: (rng.random(masks.shape) + (2 - place) * masks * rng.random((len(masks), 1, 1))).astype(np.float32)
        for place, system in enumerate(SYSTEMS)
    }
    return {system: of_system.max(axis=(1, 2)) for system, of_system in maps.items()}, maps


def kept(name, step, marked=True):
    scores, maps = predictions(name, step)
    ids = [f"{row:03}" for row in range(len(KINDS))]
    anomalous = [kind != "good" for kind in KINDS]
    return samples.summarise(ids, KINDS, anomalous, truth(name)[2] if marked else None, scores, maps)


def matrix(system):
    rng = np.random.default_rng(SYSTEMS.index(system))
    values = rng.uniform(0.4, 0.99, (2, 3))
    values[0, OBJECTS.index("bee")] = math.nan
    metrics = {metric: values ** (1 + place / 4) for place, metric in enumerate(tables.METRICS)}
    metrics["p_auroc_object"] = np.where(np.arange(3) == 0, np.nan, metrics["p_auroc_object"])  # undefined for the ant
    return {"matrix": metrics, "summary": tables.summarise(metrics), "bytes": 1_500_000}


def run(**others):
    own, *floors = SYSTEMS
    return {
        "config": {"method": own, "dataset": {"name": EVIL}, "modality": "rgb+depth", "seed": 3},
        "protocol": "2-1",
        "objects": OBJECTS,
        "steps": STEPS,
        **matrix(own),
        "floors": {system: matrix(system) for system in floors},
        "seconds": 75.0,
        "versions": {"jax": "0.11"},
        **others,
    }


def images(name, rows):
    return tuple(array[list(rows)] for array in truth(name))


def write(workdir, **others):
    results = run(**others)
    for step, name in ((0, "cat"), (0, "ant"), (1, "cat"), (1, "ant"), (1, "bee")):
        samples.save(workdir, step, name, kept(name, step))
    ledger = Ledger(workdir / "ledger.jsonl")
    for step in (0, 1):
        for epoch in range(5):
            ledger.append("epoch", step=step, epoch=epoch, loss=10.0 / (1 + epoch), fusion=5.0 / (1 + epoch), kl=0.01)
    html.write(workdir, results, images)
    return results


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write(folder)
    return folder
