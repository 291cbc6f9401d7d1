"""The training commands: what they refuse and in which words, where they run from, what they leave behind."""

from __future__ import annotations

import csv
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from dataset.phantom import make_phantom
from dataset.volume_dataset import VolumeDataset
from dataset.volume_io import Volume, write_nifti
from tests.helpers import BASELINE, PATCHWISE, ROOT, TINY, assert_one_line_error, kill, run, start
from tests.vq_gan_3d.conftest import Train
from vq_gan_3d.checkpointing import load_checkpoint

STEPS = "training.max_steps=2"


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("training.bacth_size=2", 2, ["training.bacth_size"]),
        ("training.batch_size", 2, ["training.batch_size"]),
        ("model=nope", 2, ["nope", "vq_gan_3d_small"]),
        ("hardware.device=tpu", 2, ["hardware.device='tpu'", "cuda:N"]),
        ("hardware.device=cuda:7", 2, ["hardware.device=cuda:7", "hardware.device=auto or cpu"]),
        ("hardware.mixed_precision=fp8", 2, ["hardware.mixed_precision='fp8'"]),
        ("dataset=nifti", 2, ["dataset.root_dir", "dataset=phantom"]),
        ("dataset.root_dir=/nowhere", 2, ["/nowhere", "dataset.root_dir", "dataset=phantom"]),
        ("dataset.size=[16,32]", 2, ["[16, 32]", "[D, H, W]"]),
        ("dataset.overfit_patches=0", 2, ["dataset.overfit_patches=0"]),
        ("dataset.validation=[someone]", 2, ["dataset.validation", "someone"]),
        ("training.batch_size=6", 2, ["training.batch_size"]),
        ("training.accumulate_grad_batches=3", 2, ["training.max_steps=2", "training.accumulate_grad_batches=3"]),
        ("training.accumulate_grad_batches=0", 2, ["training.accumulate_grad_batches=0"]),
        ("training.batch_size=0", 2, ["training.batch_size=0"]),
        ("training.checkpoint_every_n_epochs=0", 2, ["training.checkpoint_every_n_epochs=0"]),
        ("training.validate_every_n_epochs=0", 2, ["training.validate_every_n_epochs=0"]),
        ("logger.every_n_steps=0", 2, ["logger.every_n_steps=0"]),
        ("training.gradient_clip_val=-1", 2, ["training.gradient_clip_val=-1"]),
        ("dataset.size=64", 2, ["size 64", "[D, H, W]"]),
        ("dataset.size=abc", 2, ["size abc", "[D, H, W]"]),
        ("dataset.patch_size=64", 2, ["size 64", "[D, H, W]"]),
        ("dataset.patch_size=[16,8.5,16]", 2, ["[16, 8.5, 16]"]),
        ("dataset.validation=phantom_00001", 2, ["dataset.validation=phantom_00001", "[phantom_00001]"]),
        ("dataset.size=[16,32,30]", 2, ["dataset.size=[16, 32, 30]", "[4, 4, 4]"]),
        ("dataset.patch_size=[16,16,15]", 2, ["dataset.patch_size=[16, 16, 15]", "[4, 4, 4]"]),
        ("model.strides=[2,2,2]", 2, ["model.strides: 2 is"]),
        ("model.widths=64", 2, ["model.widths=64"]),
        ("model.widths=[8,8,a]", 2, ["model.widths=a"]),
        ("model.discriminator_iter_start=null", 2, ["model.discriminator_iter_start=None"]),
        ("model.discriminator_2d=off", 2, ["model.discriminator_2d=off", "true or false"]),
        ("model.slices_per_plane=0", 2, ["model.slices_per_plane=0"]),
        ("model.adversarial_weight=abc", 2, ["model.adversarial_weight=abc"]),
        ("training.learning_rate=-1", 2, ["training.learning_rate=-1"]),
        ("training.learning_rate=abc", 2, ["training.learning_rate=abc"]),
        ("training.learning_rate=nan", 2, ["training.learning_rate=nan"]),
        ("training.seed=abc", 2, ["training.seed=abc"]),
        ("training.betas=0.9", 2, ["training.betas=0.9"]),
        ("training.betas=[0.9,1.5]", 2, ["training.betas=1.5"]),
        ("training.gradient_clip_val=abc", 2, ["training.gradient_clip_val=abc"]),
        ("training.num_workers=-1", 2, ["training.num_workers=-1"]),
        ("training.ema_decay=abc", 2, ["training.ema_decay=abc"]),
        ("hardware.num_nodes=2", 2, ["hardware.num_nodes=2", "torchrun"]),
        ("training.lr_schedule=linear", 2, ["training.lr_schedule='linear'"]),
        ("model.quantizer=vq", 2, ["model.quantizer='vq'"]),
        ("model.lpips_weight=1", 2, ["model.lpips_weights"]),
        ("+model._target_=os.mkdir", 2, ["model._target_=os.mkdir"]),
        ("+_target_=os.mkdir", 2, ["_target_=os.mkdir"]),
        ("+dataset.x={a:[{_target_:os.mkdir}]}", 2, ["_target_:os.mkdir"]),
        ("+hydra.callbacks.x._target_=os.mkdir", 2, ["hydra.callbacks.x._target_=os.mkdir"]),
        ('+hydra.callbacks={x: {"_target_": os.mkdir}}', 2, ["hydra.callbacks"]),
        ("--experimental-rerun=run.pickle", 2, ["run.pickle"]),
        ("dataset.root_dir=empty", 3, ["empty", "dataset.root_dir", "dataset=phantom"]),
    ],
)
def test_refused_in_one_line(train: Train, tmp_path: Path, override: str, code: int, words: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line_error(train(STEPS, override, check=code), *words)
    assert not list((tmp_path / "outputs").glob("checkpoints/*"))


@pytest.mark.parametrize(
    "override",
    [
        "dataset.size=[16,32,30]", "model.quantizer=vq", "model.n_codes=500", "training.lr_schedule=linear",
        "model.lpips_weight=1", "training.seed=abc",
    ],
)  # fmt: skip
def test_nothing_is_prepared_for_a_mistake(train: Train, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    """A cohort of days is prepared once all that needs no volume is checked."""
    import dataset.data_module as module

    monkeypatch.setattr(module, "prepare_all", lambda *_: pytest.fail("volumes are prepared"))
    assert_one_line_error(train(STEPS, override, check=2), override.split(".")[1].split("=")[0])


def test_a_number_of_steps_alone_decides(train: Train, tmp_path: Path) -> None:
    """Past the epochs, which are five batches each; discriminators that would never start are told of."""
    result = train("training.max_steps=7", "training.num_epochs=1", "model.discriminator_iter_start=7")
    assert int(load_checkpoint(tmp_path / "outputs/checkpoints/final.ckpt")["current_model_state"]["steps"]) == 7
    assert "model.discriminator_iter_start=7, and training ends at step 7: no discriminator takes part" in result.stderr
    result = train("training.num_epochs=1", "model.discriminator_iter_start=4", "output_dir=epoch")
    assert int(load_checkpoint(tmp_path / "epoch/checkpoints/final.ckpt")["current_model_state"]["steps"]) == 5
    assert "no discriminator takes part" not in result.stderr
    off = ["model.discriminator_2d=false", "model.discriminator_3d=false", "model.discriminator_iter_start=99"]
    assert "no discriminator" not in train("training.max_steps=1", *off, "output_dir=off").stderr


@pytest.mark.parametrize("tiles", [[], ["dataset.patch_size=[16,16,16]", "dataset.validation_tiles=null"]])
def test_a_narrow_window_trains_without_the_metric_of_a_wider_one(
    train: Train, tmp_path: Path, tiles: list[str]
) -> None:
    train("dataset.hu_min=-160", "dataset.hu_max=240", "training.max_steps=1", *tiles)
    with (tmp_path / "outputs/logs/validation.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert "psnr_pe_window_db" not in row
    assert float(row["psnr_db"]) > 0


def test_a_target_in_a_file_is_refused(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    node = f"{{_target_: os.mkdir, path: {tmp_path}/executed}}"
    (folder / "hostile.yaml").write_text(f"# @package _global_\ntraining:\n  max_bad_steps: {node}\n")
    result = train(f"hydra.searchpath=[pkg://config,file://{tmp_path}/mine]", "experiment=hostile", check=2)
    assert_one_line_error(result, "training.max_bad_steps._target_=os.mkdir")
    assert not (tmp_path / "executed").exists()


def test_debug_shows_the_traceback(train: Train) -> None:
    with pytest.raises(Exception, match=r"hardware\.device='tpu'"):
        train(STEPS, "hardware.device=tpu", "--debug")


def test_overwrite_deletes_nothing_before_all_is_checked(train: Train, tmp_path: Path) -> None:
    train(STEPS)
    checkpoints = tmp_path / "outputs/checkpoints"
    before = {path: path.read_bytes() for path in checkpoints.iterdir()}
    for override in ("hardware.device=tpu", "training.accumulate_grad_batches=3", "dataset.root_dir=/nowhere"):
        train(STEPS, "overwrite=true", override, check=2)
        assert {path: path.read_bytes() for path in checkpoints.iterdir()} == before
    kept = {path: path.stat().st_size for path in (tmp_path / "outputs").rglob("*") if path.is_file()}
    train("training.max_steps=1", "overwrite=true")
    assert [path.name for path in (tmp_path / "outputs/validation_results").iterdir()] == [
        "step_0001_phantom_00000.png"
    ]
    (events,) = (tmp_path / "outputs/tensorboard_logs").glob("events.*")
    assert events not in kept
    assert int(load_checkpoint(checkpoints / "last.ckpt")["current_model_state"]["steps"]) == 1


def test_what_a_run_leaves_behind(train: Train, tmp_path: Path) -> None:
    every = ("training.checkpoint_every_n_steps=2", "training.checkpoint_every_n_epochs=1", "logger.every_n_steps=2")
    result = train("training.max_steps=12", *every)
    output = tmp_path / "outputs"
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "best.ckpt",
        "epoch_01_step_0005.ckpt",  # the ends of epochs stay, and the last three of the others
        "epoch_01_step_0006.ckpt",
        "epoch_01_step_0008.ckpt",
        "epoch_02_step_0010.ckpt",
        "epoch_02_step_0012.ckpt",
        "final.ckpt",
        "last.ckpt",
    ]
    tables = {name: (output / "logs" / name).read_text().splitlines() for name in ("train.csv", "validation.csv")}
    assert [line.split(",")[0] for line in tables["train.csv"]] == ["step", "2", "4", "6", "8", "10", "12"]
    assert [line.split(",")[0] for line in tables["validation.csv"]] == ["step", "5", "10", "12"]
    assert "psnr_db" in tables["validation.csv"][0]
    header, *rows = (line.split(",") for line in tables["train.csv"])
    assert [float(row[header.index("lr")]) for row in rows] == [pytest.approx(3e-4)] * 6
    assert list((output / "tensorboard_logs").glob("events.out.tfevents.*"))
    pictures = sorted(path.name for path in (output / "validation_results").iterdir())
    assert pictures == [f"step_{step:04d}_phantom_00000.png" for step in (5, 10, 12)]
    assert "seed: 0" in (output / "config.yaml").read_text()
    log = (output / "logs/training.log").read_text()
    for text in (log, result.stderr):
        assert "data: phantom thoraces; your own: dataset=nifti dataset.root_dir=" in text
        assert "volumes: 5 for training, 1 held out; 12 steps" in text
        assert re.search(r"parameters: generator +\d", text)
        assert "done: checkpoints in outputs/checkpoints" in text
    assert not list(output.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("group", sorted(path.stem for path in (ROOT / "config/debug").glob("*.yaml")))
def test_debug_groups(train: Train, tmp_path: Path, group: str) -> None:
    """With the cohort, the workers and the starts that each sets itself."""
    own = ("dataset.n_patients", "training.num_workers", "training.warmup_steps", "model.discriminator_iter_start")
    small = [option for option in TINY if not option.startswith(own)]
    result = train(*small, f"debug={group}", "dataset.cache_dir=cache", tiny=False)
    assert (tmp_path / "outputs/checkpoints/final.ckpt").is_file()
    if group == "profiler":
        for text in (result.stderr, (tmp_path / "outputs/logs/training.log").read_text()):
            assert "Profiler Report" in text
    if group == "fdr":
        assert "volumes: 5 for training, 1 held out; 1 steps" in result.stderr
    if group == "overfit":
        assert_learnt(tmp_path / "outputs")


def assert_learnt(output: Path) -> None:
    """The L1 falls to less than half."""
    with (output / "logs/train.csv").open(newline="") as file:
        losses = [float(row["l1"]) for row in csv.DictReader(file)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_overfit_learns_the_same_few_patches_of_a_folder(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cohort that holds many more, by the patch-wise trainer."""
    (tmp_path / "data").mkdir()
    for seed in range(1, 7):
        phantom = make_phantom(seed, (24, 40, 36))
        write_nifti(tmp_path / f"data/{seed}.nii.gz", Volume(phantom.hu, phantom.affine))
    seen: set[tuple[str, bytes]] = set()
    sample_of = VolumeDataset.__getitem__

    def watched(dataset: VolumeDataset, key: tuple[int, int] | int) -> dict[str, Any]:
        sample = sample_of(dataset, key)
        if dataset.random:
            seen.add((sample["name"], sample["affine"].tobytes()))
        return sample

    monkeypatch.setattr(VolumeDataset, "__getitem__", watched)
    own = ("dataset.", "training.num_workers", "training.warmup_steps", "model.discriminator_iter_start")
    small = [option for option in TINY if not option.startswith(own)]
    train(
        *small, "debug=overfit", "dataset.root_dir=data", "dataset.patch_size=[16,16,16]",
        "dataset.validation_tiles=2", "training.validate_every_n_epochs=100", script=PATCHWISE, tiny=False,
    )  # fmt: skip
    assert len(seen) == 2
    assert_learnt(tmp_path / "outputs")


CONFIGS = [(ROOT / script).parents[1] / "config" for script in (BASELINE, PATCHWISE)]
GROUPS = [
    f"{group}={path.stem}"
    for group in ("experiment", "debug")
    for path in (ROOT / "config" / group).glob("*.yaml")
    if "/model: ddpm" not in path.read_text()  # of the diffusion trainer, which tests/ddpm composes
]


@pytest.mark.parametrize("group", sorted(GROUPS))
@pytest.mark.parametrize("config", CONFIGS, ids=["baseline", "patchwise"])
def test_groups_compose(config: Path, group: str) -> None:
    with initialize_config_dir(str(config), version_base="1.3"):
        plain, changed = compose("base_cfg"), compose("base_cfg", overrides=[group])
    assert plain != changed
    own = plain.keys() | {"demo"}  # what `make demo` reads
    assert changed.keys() <= own
    for name in ("model", "training", "hardware", "callbacks", "logger", "dataset"):
        assert changed[name].keys() == plain[name].keys(), name


@pytest.mark.parametrize("group", ["experiment", "debug"])
@pytest.mark.parametrize("config", CONFIGS, ids=["baseline", "patchwise"])
def test_a_typo_in_a_group_is_refused(config: Path, group: str) -> None:
    with initialize_config_dir(str(config), version_base="1.3"), pytest.raises(Exception, match="nope"):
        compose("base_cfg", overrides=[f"{group}=nope"])


@pytest.mark.slow
@pytest.mark.parametrize("script", [BASELINE, PATCHWISE], ids=["baseline", "patchwise"])
def test_runs_from_the_root_and_from_its_own_folder(script: str, tmp_path: Path) -> None:
    for folder in (ROOT, (ROOT / script).parents[1]):
        output = tmp_path / folder.name
        more = ["dataset.patch_size=[16,16,16]", "dataset.phantom_size=null"] if script == PATCHWISE else []
        run(script, "training.max_steps=1", f"output_dir={output}", *more, cwd=folder, XDG_CACHE_HOME=str(tmp_path))
        assert (output / "checkpoints/final.ckpt").exists()
        assert not (folder / "outputs").exists() or folder == ROOT


@pytest.mark.slow
@pytest.mark.parametrize("script", [BASELINE, PATCHWISE], ids=["baseline", "patchwise"])
def test_without_arguments_it_starts_on_phantoms_and_says_so(script: str, tmp_path: Path) -> None:
    process = start(script, "dataset.patch_size=[16,16,16]", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path))
    log = tmp_path / "outputs/logs/training.log"
    end = time.monotonic() + 120
    while not (log.exists() and "phantom" in log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    text = log.read_text()
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(timeout=60) == 143
    finally:
        kill(process) if process.poll() is None else process.communicate()
    assert "your own: dataset=nifti dataset.root_dir=" in text
