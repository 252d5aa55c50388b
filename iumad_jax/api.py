"""A trained run in Python: it goes on learning from arrays, and has a detector of its last step."""

import shutil
from pathlib import Path
from typing import Literal

from iumad_jax import experiment
from iumad_jax.data import plan
from iumad_jax.data.sample import Camera
from iumad_jax.errors import UserError
from iumad_jax.inference.detector import Detector
from iumad_jax.protocol import Step
from iumad_jax.report import history
from iumad_jax.runtime import live
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.training import additions, arrays
from iumad_jax.training.arrays import Depths, Photographs
from iumad_jax.training.dataset_changes import DatasetChanged


class Run:
    """A run whose first step is finished; `open_run` opens it.

    Every act adds a step to the run, as the commands `learn`, `calibrate` and `retire` do. It returns one line for each
    step that it finished: how well the step's objects are judged now, and what it did to the others.

    Images are good ones of one object: `rgb` is uint8 of shape (h, w, 3) for one image, (n, h, w, 3) for several, or a
    sequence of images, which may differ in size where depth is not used; None if the run learns from depth alone.
    `depth` is in metres, with the same axes but the last, 0 or not finite where missing; a run that learns from RGB
    alone does not use it. `camera` is that of the depth, by default that of the run's training images, scaled to the
    width of these. Images are written into the run's folder before anything is learned from them. After an interruption
    the same call goes on.

    All acts raise UserError, and leave the run as it was, if an argument cannot be used.
    """

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.config = workdirs.read(workdir)
        self._detector: Detector | None = None

    @property
    def detector(self) -> Detector:
        """The model after the run's last finished step.

        Raises:
            UserError: As `Detector.load`.
        """
        self._detector = self._detector.refresh() if self._detector else Detector.load(self.workdir)
        return self._detector

    def learn(
        self,
        name: str,
        rgb: Photographs | None,
        depth: Depths | None = None,
        camera: Camera | None = None,
        update: bool = False,
    ) -> str:
        """Learn a new object, or with `update` further images of a learned one."""
        return self._add("update" if update else "learn", name, rgb, depth, camera)

    def calibrate(
        self, name: str, rgb: Photographs | None, depth: Depths | None = None, camera: Camera | None = None
    ) -> str:
        """Set the thresholds of a learned object anew: the images join those that the run keeps of it."""
        return self._add("calibrate", name, rgb, depth, camera)

    def retire(self, name: str, undo: bool = False) -> str:
        """Retire an object: it is no longer recognised or decided about. Its results stay. `undo` takes it back."""
        steps, finished = additions.begun(self.workdir)
        add = additions.with_restored if undo else additions.with_retired
        return self._go_on(add(steps, finished, name), finished)

    def history(self) -> str:
        """Return a table of what each step learned, when, and what it did to the other objects."""
        return history.table_of_steps(self.config.method, self.workdir)

    def _add(
        self,
        act: Literal["learn", "update", "calibrate"],
        name: str,
        rgb: Photographs | None,
        depth: Depths | None,
        camera: Camera | None,
    ) -> str:
        """Add a step with images of an object."""
        arrays.check_name(name)
        steps, finished = additions.begun(self.workdir)
        if act != "learn":
            additions.in_use(steps, name)
        elif name in self.detector.objects:
            raise UserError(f"the run has learned {name} already; pass update=True to learn further images of it.")
        root = arrays.write(self.workdir, self.detector, name, rgb, depth, camera)
        changes = {"dataset.name": "folder", "dataset.root": str(root)}
        try:
            if act == "learn":
                steps = additions.with_new(self.config, steps, name, changes, finished)
            else:
                steps = additions.with_further(self.config, self.workdir, steps, finished, act, name, changes)
            return self._go_on(steps, finished)
        except UserError:
            if all(step.changes.get("dataset.root") != str(root) for step in plan.read(self.workdir)):
                shutil.rmtree(root)  # no step has begun with it
            raise

    def _go_on(self, steps: tuple[Step, ...], finished: int) -> str:
        """Run the steps after the finished ones; describe what they did."""
        try:
            results = experiment.run(self.config, self.workdir, steps)
        except DatasetChanged as changed:
            live.log(str(changed))
            results = changed.results
        assert results is not None  # one process
        return experiment.effects(results, finished)


def open_run(workdir: str | Path) -> Run:
    """Open a run to go on with it, and to use its detector.

    Args:
        workdir: Workdir of a run whose first step is finished. The run's dataset need not be there any more.

    Raises:
        UserError: If the workdir holds no run, or a damaged one.
    """
    if not isinstance(workdir, str | Path):
        raise UserError(f"workdir is a {type(workdir).__name__}; pass a path.")
    return Run(Path(workdir))
