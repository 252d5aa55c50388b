"""Live view of a working run: live.jsonl, optionally TensorBoard, and log lines where standard error is no terminal.

Unlike the ledger, live.jsonl contains times and is never truncated: a resumed run appends to it.
"""

import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iumad_jax.errors import UserError, counted
from iumad_jax.runtime.ledger import Ledger

_DOING = {
    "learn": "learning",
    "update": "updating",
    "calibrate": "calibrating",
    "retire": "retiring",
    "restore": "restoring",
}
_LOG_INTERVAL = 30.0  # minimum seconds between two log lines within a step


def check(tensorboard: bool) -> None:
    """Raise UserError if TensorBoard is enabled but its writer is not installed."""
    if tensorboard and find_spec("tensorboardX") is None:
        raise UserError(
            "config.report.tensorboard is True but tensorboardX is not installed; run pip install tensorboardX."
        )


class Live:
    """The live view of a run."""

    def __init__(self, workdir: Path, tensorboard: bool) -> None:
        """Open `live.jsonl` and, if enabled, a TensorBoard log in `tensorboard/`.

        Raises:
            UserError: If a file cannot be written.
        """
        self._log = Ledger(workdir / "live.jsonl")
        self._board: Any = None
        self._logged_at = 0.0  # time of the last log line, on the monotonic clock
        if tensorboard:
            from tensorboardX import SummaryWriter  # an optional extra

            self._board = SummaryWriter(str(workdir / "tensorboard"))

    def log_step(self, step: int, act: str, names: tuple[str, ...], images: int, changes: Mapping[str, Any]) -> None:
        """Record that a step begins to do something to objects, with changed config keys."""
        self.log_event("step", step=step, act=act, objects=names, images=images, changes=changes)
        self._logged_at = time.monotonic()
        log(f"step {step}: {_DOING[act]} {', '.join(names)}" + (f" from {counted(images, 'images')}" if images else ""))

    def log_epoch(
        self,
        step: int,
        epoch: int,
        epochs: int,
        losses: dict[str, float],
        learning_rate: float,
        images: int,
        seconds: float,
    ) -> None:
        """Record a finished epoch.

        Args:
            step: Number of the step.
            epoch: Number of the epoch, from 0.
            epochs: Number of epochs per step.
            losses: Mean losses by name; `loss` is the total.
            learning_rate: Learning rate.
            images: Number of images in the epoch.
            seconds: Duration of the epoch.
        """
        speed = images / seconds
        values = {**losses, "learning_rate": learning_rate, "images_per_second": speed}
        self.log_event("epoch", step=step, epoch=epoch, **values)
        if self._board:
            for name, value in values.items():
                tag = f"losses/{name}" if name in losses else name
                self._board.add_scalar(tag, value, step * epochs + epoch)
            self._board.flush()
        if not sys.stderr.isatty() and time.monotonic() - self._logged_at > _LOG_INTERVAL:
            self._logged_at = time.monotonic()
            remaining = (epochs - epoch - 1) * seconds
            log(
                f"step {step}: epoch {epoch + 1} of {epochs}, loss {losses['loss']:.4g}, {speed:.3g} images/s,"
                f" {remaining / 60:.1f} min left"
            )

    def log_evaluation(
        self, step: int, object_: str, method: str, values: dict[str, float], details: dict[str, dict[str, Any]]
    ) -> None:
        """Record the metrics of one object and method after a step, and the details that the ledger has of them."""
        self.log_event("evaluation", step=step, object=object_, method=method, **values, **details)
        if self._board:
            for metric, value in values.items():
                if np.isfinite(value):
                    self._board.add_scalar(f"{metric}/{object_}/{method}", value, step)

    def log_picture(self, step: int, object_: str, path: Path) -> None:
        """Show the saved heatmaps of an object after a step in TensorBoard."""
        if self._board:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._board.add_image(f"heatmaps/{object_}", pixels, step, dataformats="HWC")
            self._board.flush()

    def log_event(self, event: str, **fields: Any) -> None:
        """Append an event of the ledger to live.jsonl, with the time."""
        self._log.append(event, time=datetime.now(UTC).isoformat(timespec="milliseconds"), **fields)

    def close(self) -> None:
        """Stop the thread of the TensorBoard writer."""
        if self._board:
            self._board.close()


def log(line: str) -> None:
    """Print a line about the run's progress to standard error."""
    print(line, file=sys.stderr, flush=True)
