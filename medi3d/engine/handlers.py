"""Everything around the training step: validation, the table of metrics, checkpoints, curves and progress.

Each handler is attached to a trainer of `medi3d.engine.trainer`. `Validation` comes first: it announces
`TrainingEvents.VALIDATED`, on which the others act, in the order in which they were attached.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.engines.workflow import Workflow
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medi3d.engine import distributed
from medi3d.engine.log import log, screen
from medi3d.engine.metrics import Row, mean_row
from medi3d.engine.state import TrainingState, check_finite
from medi3d.engine.trainer import TrainingEvents, evaluate
from medi3d.files import read_table, write_table


class Validation:
    """Every `every` steps, and after the last one, predicts all validation cases.

    `trainer.state.metrics` becomes a row: step, train_loss (mean since the last row), val_loss, the means of
    the task's metrics, learning rates, wall and processor seconds since the start of the run (of all
    processes; training_cpu_seconds without reading, validation and writing), and data_share, the share of
    training time spent waiting for samples (printed as "data / step").
    """

    def __init__(self, evaluator: SupervisedEvaluator, state: TrainingState, every: int):
        self.evaluator, self.state, self.every = evaluator, state, every
        self._losses: list[float] = []

    def attach(self, trainer: Workflow) -> None:
        """Watch `trainer`."""
        self._watch = StepWatch()
        self._watch.attach(trainer)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._remember)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(event_filter=self._is_due), self._validate)

    def _is_due(self, trainer: Workflow, step: int) -> bool:
        return step % self.every == 0 or self.state.finished

    def _remember(self, trainer: Workflow) -> None:
        self._losses.append(trainer.state.output["loss"])

    def _validate(self, trainer: Workflow) -> None:
        distributed.share_buffers(self.state.network)
        check_finite(self.state.network, self.state.step)
        with self.state.clock.apart():
            means = mean_row(evaluate(self.evaluator))
        costs = distributed.gather(self.state.clock.read())
        losses = [loss for part in distributed.gather(self._losses) for loss in part]
        trainer.state.metrics = {
            "step": self.state.step,
            "train_loss": sum(losses) / len(losses),
            "val_loss": means.pop("loss"),
            **means,
            **self.state.learning_rates(),
            "wall_seconds": costs[0]["wall_seconds"],
            "cpu_seconds": sum(cost["cpu_seconds"] for cost in costs),
            "training_cpu_seconds": sum(cost["training_cpu_seconds"] for cost in costs),
            "data_share": self._watch.data_share(),
        }
        self._losses = []
        with self.state.clock.apart():  # tables, checkpoints and curves do not count as training
            trainer.fire_event(TrainingEvents.VALIDATED)


class StepWatch:
    """Measures how long the trainer waits for data, and how long its steps take."""

    def __init__(self) -> None:
        self._data = self._step = self._since = 0.0

    def attach(self, trainer: Workflow) -> None:
        """Watch `trainer`."""
        trainer.add_event_handler(Events.GET_BATCH_STARTED, self._start)
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, self._got_data)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._did_step)

    def _start(self, _: Workflow) -> None:
        self._since = time.perf_counter()

    def _got_data(self, _: Workflow) -> None:
        self._data += time.perf_counter() - self._since

    def _did_step(self, _: Workflow) -> None:
        self._step += time.perf_counter() - self._since

    def data_share(self) -> float:
        """Fraction of time spent waiting for data since the last call."""
        share = self._data / max(1e-9, self._data + self._step)
        self._data = self._step = 0.0
        return share


class MetricsTable:
    """Writes a row of `metrics.csv` at each validation; a resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        self.rows: list[Row] = [row for row in read_table(path) if row["step"] <= resumed_step]

    def attach(self, trainer: Workflow) -> None:
        """Watch `trainer`."""
        trainer.add_event_handler(TrainingEvents.VALIDATED, self._write)

    def _write(self, trainer: Workflow) -> None:
        self.rows.append(dict(trainer.state.metrics))
        write_table(self.path, self.rows)


class PlateauWatch:
    """Passes validation scores to the budget, which detects a plateau."""

    def __init__(self, table: MetricsTable, state: TrainingState, score: str):
        self.table, self.state, self.score = table, state, score

    def attach(self, trainer: Workflow) -> None:
        """Watch `trainer`."""
        trainer.add_event_handler(TrainingEvents.VALIDATED, self._note)

    def _note(self, _: Workflow) -> None:
        self.state.budget.note_scores(self.state.step, [row[self.score] for row in self.table.rows])


class Checkpoints:
    """Writes the checkpoint from which a run resumes (last), and the weights with the highest score (best).

    Both appear complete or not at all; a run may be killed at any moment.
    """

    def __init__(self, best: Path, last: Path, state: TrainingState, score: str):
        self.best, self.last, self.state, self.score = best, last, state, score

    def attach(self, trainer: Workflow) -> None:
        """Watch `trainer`."""
        trainer.add_event_handler(TrainingEvents.VALIDATED, self._save)

    def _save(self, trainer: Workflow) -> None:
        score = trainer.state.metrics[self.score]
        if math.isnan(score):  # no label in any case, in truth or prediction: nothing to choose by
            score = -math.inf
        if score >= self.state.best:  # of equal scores the later one, whose learning rate was lower
            self.state.best = score
            self.state.save_network(self.best, score)
        self.state.save(self.last)


class OnValidation:
    """Calls a function at each validation."""

    def __init__(self, action: Callable[[Workflow], None]):
        self.action = action

    def attach(self, trainer: Workflow) -> None:
        """Watch `trainer`."""
        trainer.add_event_handler(TrainingEvents.VALIDATED, self.action)


class TrainingProgress:
    """A bar with loss, time left and the last score; without a terminal, a line every 30 seconds.

    `position` maps a step to progress towards the trainer's last step, for budgets of compute.
    """

    seconds_between_lines = 30.0

    def __init__(self, score: str, position: Callable[[int], float] = float):
        self.score, self.position = score, position
        self._bar: Progress | None = None
        self._last_line = time.monotonic()
        self._last_score = "not yet"

    def attach(self, trainer: Workflow) -> None:
        """Watch `trainer`."""
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        trainer.add_event_handler(TrainingEvents.VALIDATED, self._validated)

    def _start(self, trainer: Workflow) -> None:
        self._begun, self._first = time.monotonic(), self.position(trainer.state.iteration)
        if not screen.is_terminal:
            return
        words = TextColumn("loss {task.fields[loss]:.4f}  {task.description}")
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), words, TimeRemainingColumn())
        self._bar = Progress(*columns, console=screen)
        steps, done = trainer.state.epoch_length, self.position(trainer.state.iteration)
        self._task = self._bar.add_task(self._words(), total=steps, loss=float("nan"))
        self._bar.update(self._task, completed=done)
        self._bar.start()

    def _step(self, trainer: Workflow) -> None:
        step, loss = trainer.state.iteration, trainer.state.output["loss"]
        if self._bar is not None:
            completed = self.position(step)
            self._bar.update(self._task, completed=completed, loss=loss, description=self._words())
        elif self._line_is_due(step < trainer.state.epoch_length):
            position = self.position(step)
            pace = (self._last_line - self._begun) / (position - self._first)
            left = pace * (trainer.state.epoch_length - position)
            log.info(f"step {step}: loss {loss:.4f}, about {left:.0f} s left")

    def _line_is_due(self, unfinished: bool) -> bool:
        due = unfinished and time.monotonic() - self._last_line > self.seconds_between_lines
        if due:
            self._last_line = time.monotonic()
        return due

    def _validated(self, trainer: Workflow) -> None:
        row = trainer.state.metrics
        self._last_score = f"{row[self.score]:.4f}"
        log.info(
            f"step {row['step']}: train loss {row['train_loss']:.4f}, validation loss {row['val_loss']:.4f}, "
            f"{self.score} {row[self.score]:.4f} ({row['cpu_seconds']:.0f} CPU s, "
            f"{row['wall_seconds']:.0f} s; data / step {row['data_share']:.1%})"
        )

    def _words(self) -> str:
        return f"{self.score} {self._last_score}"

    def close(self) -> None:
        """Restore the terminal, however the run ended."""
        if self._bar is not None:
            self._bar.stop()
