"""How training scripts meet the command line: Hydra for the configuration, one line and an exit code for errors."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from errors import ConfigurationError, TerminatedError, one_line, run_command

_DEBUG_WORDS = {"--debug", "debug=true"}

# `_target_` as a key of an override or of a dictionary in its value; a folder may have it in its name
_TARGET_KEY = re.compile(r"""(?<!\w)_target_["']?\s*[:=]""")


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError("stopped by SIGTERM before or after training: nothing to save")


def _find_target(node: Any, path: str = "") -> str | None:
    """Path of the first ``_target_`` in a configuration."""
    if isinstance(node, DictConfig):
        items = [(str(key), value) for key, value in node.items_ex(resolve=False)]
    elif isinstance(node, ListConfig):
        items = [(str(index), value) for index, value in enumerate(node._iter_ex(resolve=False))]
    else:
        return None
    for key, value in items:
        here = f"{path}.{key}" if path else key
        if key == "_target_":
            return f"{here}={value}"
        if found := _find_target(value, here):
            return found
    return None


def run_training(config_dir: Path, train: Callable[[DictConfig], int]) -> int:
    """Compose ``base_cfg`` from ``config_dir`` with the overrides of the command line, and train.

    Works from any folder; shared groups come from the ``config`` package. ``--debug`` or ``debug=true`` shows
    tracebacks.

    Args:
        config_dir: folder of ``base_cfg.yaml``.
        train: what to run; returns an exit code.

    Returns:
        The exit code for ``sys.exit``.
    """
    debug = not _DEBUG_WORDS.isdisjoint(sys.argv)
    sys.argv = [argument for argument in sys.argv if argument not in _DEBUG_WORDS]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed and exited with 1
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    codes: list[int] = []

    def refuse(what: str) -> NoReturn:
        raise ConfigurationError(f"{what}: nothing in a configuration may name code to run")

    @hydra.main(version_base="1.3", config_path=str(config_dir), config_name="base_cfg")
    def main(config: DictConfig) -> None:
        if key := _find_target(config):
            refuse(key)
        codes.append(train(config))

    def command() -> int:
        # before Hydra reads them: it calls targets below `hydra` on its own, and unpickles for a rerun
        for argument in sys.argv[1:]:
            if _TARGET_KEY.search(argument) or argument.startswith("--experimental-rerun"):
                refuse(argument)
        try:
            main()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigurationError(one_line(error)) from error
        return max(codes, default=0)

    return run_command(command, debug=debug)
