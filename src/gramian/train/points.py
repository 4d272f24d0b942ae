"""The recorded trajectory of a run: when a point is due, and who records it."""

import torch

from gramian import ranks
from gramian.observe.recorder import TrajectoryRecorder
from gramian.train.processes import Processes
from gramian.train.run import Run
from gramian.train.sharding import Whole, whole


class Points:
    """The points of a run's trajectory, every so many steps and at the end, recorded by the main process.

    Parameters that are cut up are gathered in the host's memory for it.
    """

    def __init__(
        self, model: torch.nn.Module, run: Run, mode: str, every: int, step: int, processes: Processes
    ) -> None:
        self._every, self._processes = every, processes
        self._model = whole(model, keep=processes.is_main)
        self._recorder: TrajectoryRecorder | None = None

        def begin() -> dict[str, torch.Tensor]:
            self._recorder = TrajectoryRecorder(self._model, run.folder / "trajectory", mode)
            self._recorder.start(step)
            latest = self._recorder.latest
            return {"latest": torch.tensor(-1 if latest is None else latest)}

        latest = int(ranks.on_main(begin)["latest"])
        self._latest = None if latest < 0 else latest

    def due(self, step: int, end: bool) -> bool:
        """Whether a step is the first one, one of every so many or the end, and not yet recorded."""
        return step != self._latest and (self._latest is None or step % self._every == 0 or end)

    def record(self, step: int) -> None:
        """Record a point.

        Raises: DivergedError, on all processes, when a weight is not finite.
        """

        def record() -> None:
            assert self._recorder is not None
            self._recorder.record(step)

        if isinstance(self._model, Whole):
            self._model.gather(keep=self._processes.is_main)
        self._processes.on_main(record)
        self._latest = step
