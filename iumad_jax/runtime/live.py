"""What can be watched while a run works: live.jsonl, TensorBoard if wanted, and plain lines where there is no terminal.

Unlike the ledger this knows the clock, and is never cut back: a run that was stopped and goes on adds to it.
"""

import sys
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iumad_jax.errors import UserError
from iumad_jax.runtime.ledger import Ledger

_QUIET = 30.0  # seconds between two lines of training


def check(tensorboard: bool) -> None:
    """Raises UserError if TensorBoard is wanted and its writer is not installed."""
    if tensorboard and find_spec("tensorboardX") is None:
        raise UserError(
            "config.report.tensorboard is True but tensorboardX is not installed; run pip install tensorboardX."
        )


class Live:
    """The live view of a run."""

    def __init__(self, workdir: Path, tensorboard: bool) -> None:
        """Opens `live.jsonl` and, if wanted, a log for TensorBoard in `tensorboard/`.

        Raises:
            UserError: they cannot be written.
        """
        self._log = Ledger(workdir / "live.jsonl")
        self._board: Any = None
        self._said = 0.0
        if tensorboard:
            from tensorboardX import SummaryWriter  # an optional extra

            self._board = SummaryWriter(str(workdir / "tensorboard"))

    def begin(self, step: int, names: tuple[str, ...], images: int) -> None:
        """A step begins to learn these objects from so many images."""
        self.event("step", step=step, learned=names, images=images)
        self._said = time.monotonic()
        log(f"step {step}: learning {', '.join(names)} from {images} images")

    def epoch(
        self,
        step: int,
        epoch: int,
        epochs: int,
        losses: dict[str, float],
        learning_rate: float,
        images: int,
        seconds: float,
    ) -> None:
        """An epoch, the number `epoch` of `epochs`, took so many seconds for so many images."""
        speed = images / seconds
        values = {**losses, "learning_rate": learning_rate, "images_per_second": speed}
        self.event("epoch", step=step, epoch=epoch, **values)
        if self._board:
            for name, value in values.items():
                tag = f"losses/{name}" if name in losses else name
                self._board.add_scalar(tag, value, step * epochs + epoch)
            self._board.flush()
        if not sys.stderr.isatty() and time.monotonic() - self._said > _QUIET:
            self._said = time.monotonic()
            left = (epochs - epoch - 1) * seconds
            log(
                f"step {step}: epoch {epoch + 1} of {epochs}, loss {losses['loss']:.4g}, {speed:.3g} images/s,"
                f" {left / 60:.1f} min left"
            )

    def evaluation(self, step: int, object_: str, method: str, values: dict[str, float]) -> None:
        """The metrics of one object and method after a step."""
        self.event("evaluation", step=step, object=object_, method=method, **values)
        if self._board:
            for metric, value in values.items():
                if np.isfinite(value):
                    self._board.add_scalar(f"{metric}/{object_}/{method}", value, step)

    def picture(self, step: int, object_: str, path: Path) -> None:
        """The heatmaps of an object after a step, as they were saved."""
        if self._board:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._board.add_image(f"heatmaps/{object_}", pixels, step, dataformats="HWC")
            self._board.flush()

    def event(self, event: str, **fields: Any) -> None:
        """An event of the ledger, with the time."""
        self._log.append(event, time=datetime.now(UTC).isoformat(timespec="milliseconds"), **fields)

    def close(self) -> None:
        """Ends TensorBoard's thread."""
        if self._board:
            self._board.close()


def log(line: str) -> None:
    """A line about the run's progress, on standard error."""
    print(line, file=sys.stderr, flush=True)
