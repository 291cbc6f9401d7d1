"""Which sample a data worker died of, and an end that no hanging worker holds up."""

from __future__ import annotations

import multiprocessing

from errors import one_line
from vq_gan_3d.stage import TrainingData


def stop_workers() -> None:
    """Kill all worker processes: one that hangs would also hang our exit."""
    for worker in multiprocessing.active_children():
        worker.kill()


def blame_worker(data: TrainingData, steps: int, validation_batch: int | None, message: str) -> str:
    """One line that names what a failed worker was busy with.

    Args:
        data: of the run.
        steps: batches trained so far.
        validation_batch: the one that validation waits for; None while training.
        message: of the loader's error.
    """
    if "DataLoader worker process" in message:  # it raised; the last line of its traceback names the sample
        return one_line(message.strip().splitlines()[-1].removeprefix("errors.InputError: "))
    if validation_batch is not None:
        names = data.names_of_validation()[validation_batch : validation_batch + data.batches_in_flight]
        where = "validation"
    else:
        names, where = data.names_of_training(steps), f"step {steps}"
    hint = "see whether it can be read at all, or raise training.worker_timeout_s"
    if "timed out" not in message:
        hint = "out of memory? lower training.num_workers"
    return f"a data worker failed in {where} on one of {', '.join(names)} ({one_line(message)}): {hint}"
