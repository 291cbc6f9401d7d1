"""The runner of the demo's stages: what is done is passed over, what was interrupted goes on, errors pass through."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from errors import ConfigurationError
from evaluation.pipeline import Pipeline, Stage, StageError
from tests.helpers import ROOT, environment

# Copies its input to its output, says with which arguments, and ends as it is told.
SCRIPT = """
import sys, time
from pathlib import Path
source, target, *rest = sys.argv[1:]
with open(Path(target).parent / "calls", "a") as calls:
    print(*rest, file=calls)
codes = [int(word) for word in rest if word.isdigit()]
if "stale" not in rest:
    Path(target).write_text(Path(source).read_text())
if "sleep" in rest:
    time.sleep(60)
sys.exit(codes[0] if codes else 0)
"""


class Workshop:
    """A folder with one input and one stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "results"
        self.source, self.target = folder / "source", self.output / "target"
        self.source.write_text("one")
        (folder / "script.py").write_text(SCRIPT)

    def stage(self, *words: str, **changes: object) -> Stage:
        stage = Stage("copy", "copying", str(self.folder / "script.py"), (str(self.source), str(self.target), *words),
                      (self.source,), (self.target,), (self.target,))  # fmt: skip
        return replace(stage, **changes)  # type: ignore[arg-type]

    def run(self, *stages: Stage) -> None:
        pipeline = Pipeline(self.output)
        with pipeline.claimed():
            for stage in stages:
                pipeline.run(stage)

    @property
    def calls(self) -> list[str]:
        return (self.output / "calls").read_text().splitlines()


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_a_finished_stage_is_passed_over(workshop: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
    workshop.run(workshop.stage())
    assert workshop.target.read_text() == "one"
    workshop.run(workshop.stage())
    assert workshop.calls == [""]
    assert "[1] copying: up to date" in capfd.readouterr().out


@pytest.mark.parametrize("change", ["input", "output gone", "output changed", "command", "record damaged"])
def test_a_stage_runs_again_when_something_changed(workshop: Workshop, change: str) -> None:
    workshop.run(workshop.stage())
    if change == "input":
        workshop.source.write_text("another")
    elif change == "output gone":
        workshop.target.unlink()
    elif change == "output changed":
        workshop.target.write_text("cut")
        os.utime(workshop.target, ns=(1, 1))
    elif change == "record damaged":
        (workshop.output / "stages/copy.json").write_text('{"key": "')
    workshop.run(workshop.stage(*(["more"] if change == "command" else [])))
    assert len(workshop.calls) == 2
    assert workshop.target.read_text() == workshop.source.read_text()


def test_what_another_command_made_is_removed_before(workshop: Workshop) -> None:
    other = workshop.output / "made"
    workshop.run(workshop.stage(owns=(workshop.target, other)))
    other.mkdir()
    (other / "old").touch()
    workshop.run(workshop.stage(owns=(workshop.target, other)))
    assert (other / "old").exists()  # nothing changed, nothing removed
    workshop.run(workshop.stage("more", owns=(workshop.target, other)))
    assert not other.exists()


def test_a_failure_passes_its_exit_code_on_and_is_tried_again(workshop: Workshop) -> None:
    for _ in range(2):
        with pytest.raises(StageError, match="exit 3") as caught:
            workshop.run(workshop.stage("3"))
        assert caught.value.exit_code == 3
    assert workshop.calls == ["3", "3"]


def test_skips_are_no_failure(workshop: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
    workshop.run(workshop.stage("4"))
    workshop.run(workshop.stage("4"))
    assert workshop.calls == ["4"]
    assert "left out" in capfd.readouterr().out


def test_a_stage_that_leaves_nothing_is_told(workshop: Workshop) -> None:
    with pytest.raises(StageError, match="without making it"):
        workshop.run(workshop.stage("stale"))


def test_a_missed_threshold_is_no_bug_but_a_bug_is(workshop: Workshop) -> None:
    workshop.run(workshop.stage("1", may_miss=True))
    assert workshop.calls == ["1"]
    with pytest.raises(StageError, match="exit 1"):
        workshop.run(workshop.stage("1", "second"))
    workshop.target.write_text("of an earlier run")
    os.utime(workshop.target, (1, 1))
    with pytest.raises(StageError, match="exit 1"):
        workshop.run(workshop.stage("1", "stale", may_miss=True, owns=()))


def test_a_training_goes_on_from_its_last_checkpoint(workshop: Workshop) -> None:
    training = workshop.output / "run"
    with pytest.raises(StageError):
        workshop.run(workshop.stage("3", training=training, owns=(training,)))
    (training / "checkpoints").mkdir(parents=True)
    (training / "checkpoints/last.ckpt").touch()
    with pytest.raises(StageError):
        workshop.run(workshop.stage("3", training=training, owns=(training,)))
    with pytest.raises(StageError):  # other settings start afresh
        workshop.run(workshop.stage("3", "more", training=training, owns=(training,)))
    assert workshop.calls == ["3", "3 ckpt_path=last", "3 more"]


def test_a_folder_of_something_else_is_not_touched(workshop: Workshop) -> None:
    workshop.output.mkdir()
    (workshop.output / "thesis.tex").touch()
    with pytest.raises(ConfigurationError, match="something else"):
        workshop.run(workshop.stage())
    assert [path.name for path in workshop.output.iterdir()] == ["thesis.tex"]


def test_the_command_is_shown_so_that_it_can_be_copied(
    workshop: Workshop, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop.folder)
    workshop.run(workshop.stage("two words", f"key={workshop.folder / 'a'}"))
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("$ ")]
    assert line.endswith(" script.py source results/target 'two words' key=a")
    monkeypatch.chdir(workshop.output)  # elsewhere it is the same stage
    workshop.run(workshop.stage("two words", f"key={workshop.folder / 'a'}"))
    assert len(workshop.calls) == 1
    workshop.target.unlink()
    subprocess.run(shlex.split(line[2:]), check=True, cwd=workshop.folder)
    assert workshop.target.read_text() == "one"


# Runs the workshop's stage in a process of its own.
DRIVER = """
import sys
from pathlib import Path
from errors import run_command
from tests.test_demo_pipeline import Workshop
workshop = Workshop(Path(sys.argv[1]))
sys.exit(run_command(lambda: workshop.run(workshop.stage(*sys.argv[2:]))))
"""


def start(workshop: Workshop, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(workshop.folder), *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_until_called(workshop: Workshop) -> None:
    end = time.monotonic() + 120
    while not workshop.target.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_ends_the_stage_too(workshop: Workshop) -> None:
    process = start(workshop, "sleep")
    wait_until_called(workshop)
    process.send_signal(signal.SIGTERM)  # to the runner alone
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert stderr.splitlines()[-1].startswith("error: stopped by SIGTERM")
    with (workshop.output / "stages/lock").open() as lock:  # the command, which would hold it, is gone
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_a_command_that_outlives_a_killed_runner_is_waited_for(workshop: Workshop) -> None:
    first = start(workshop, "sleep")
    wait_until_called(workshop)
    first.kill()  # the runner alone
    second = start(workshop)
    assert second.stdout is not None
    assert "waiting until it has ended" in second.stdout.readline()
    os.killpg(first.pid, signal.SIGKILL)  # its group: the command
    second.communicate(timeout=60)
    assert second.returncode == 0
    assert workshop.calls == ["sleep", ""]
    first.communicate()


def test_results_of_other_data_are_never_removed_in_silence(workshop: Workshop) -> None:
    def run(data: str) -> None:
        pipeline = Pipeline(workshop.output)
        with pipeline.claimed():
            pipeline.belongs_to(data)
            pipeline.run(workshop.stage(data))

    run("/hospital/a")
    run("/hospital/a")
    with pytest.raises(ConfigurationError, match=r"results of /hospital/a, not of /hospital/b: give another --output"):
        run("/hospital/b")
    assert workshop.calls == ["/hospital/a"]
    assert workshop.target.exists()
