"""How training scripts meet the command line: Hydra for the configuration, one line and an exit code for errors."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from errors import ConfigurationError, TerminatedError, one_line, run_command


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError("stopped by SIGTERM before training began: nothing to save")


def run_training(config_dir: Path, train: Callable[[DictConfig], int]) -> int:
    """Compose ``base_cfg`` from ``config_dir`` with the overrides of the command line, and train.

    Works from any folder; shared groups come from the ``config`` package. ``debug=true`` is no group of ours: pass
    ``--debug`` to see a traceback.

    Args:
        config_dir: folder of ``base_cfg.yaml``.
        train: what to run; returns an exit code.

    Returns:
        The exit code for ``sys.exit``.
    """
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed and exited with 1
    signal.signal(signal.SIGTERM, _terminate)
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(config_dir), config_name="base_cfg")
    def main(config: DictConfig) -> None:
        codes.append(train(config))

    def command() -> int:
        try:
            main()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigurationError(one_line(error)) from error
        return max(codes, default=0)

    return run_command(command, debug=debug)
