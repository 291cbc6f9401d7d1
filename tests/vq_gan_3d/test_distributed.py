"""Two processes of batch 1 train as one process of batch 2: gradients, buffers, weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import BASELINE, environment, run
from vq_gan_3d.checkpointing import load_checkpoint
from vq_gan_3d.distributed import all_reduce_mean, all_reduce_sum, rank, world_size

# Lightning starts the further processes by running the same script again.
SCRIPT = """
import sys
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from dataset.sampler import ResumableSampler
from tests.vq_gan_3d.test_vqgan_module import build, volumes
from vq_gan_3d.optimization import GuardedOptimizer

quantizer, processes, batches, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
record = {"gradients": [], "log": []}
step = GuardedOptimizer.step

def recorded(guarded, rate):
    part = guarded.module.codec if guarded.name == "generator" else guarded.module.discriminators
    record["gradients"].append({f"{guarded.name}.{n}": p.grad.clone() for n, p in part.named_parameters()})
    return step(guarded, rate)

GuardedOptimizer.step = recorded

class Keep(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        record["log"].append({k: v.detach().clone() for k, v in trainer.callback_metrics.items()})
        buffers = {k: v.clone() for k, v in pl_module.named_buffers()}
        record.setdefault("buffers", []).append(buffers)

module = build({"quantizer": quantizer, "ema_decay": 0.5}, {"slices_per_plane": 1}, {"learning_rate": 0.0})
samples = [{"hu": v[0]} for v in volumes(4)]
strategy = "ddp_find_unused_parameters_true" if processes > 1 else "auto"

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        sampler = ResumableSampler(4, 2 // processes, 0, self.trainer.global_rank, processes)
        return DataLoader([samples[i] for _, i in sampler], batch_size=2 // processes)

trainer = pl.Trainer(accelerator="cpu", devices=processes, strategy=strategy, max_epochs=1, limit_train_batches=batches,
                     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                     use_distributed_sampler=False, callbacks=[Keep()])
trainer.fit(module, Data())
record["state"] = module.state_dict()
torch.save(record, f"{out}.{trainer.global_rank}")
"""


def train(folder: Path, quantizer: str, processes: int, batches: int) -> list[dict]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    out = folder / f"{quantizer}-{processes}"
    subprocess.run(
        [sys.executable, str(script), quantizer, str(processes), str(batches), str(out)],
        env=environment(), check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    return [torch.load(f"{out}.{number}") for number in range(processes)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-12))


def test_alone_collectives_do_nothing():
    x = torch.tensor([1.0, 2.0])
    assert (world_size(), rank()) == (1, 0)
    assert all_reduce_sum(x) is x
    assert all_reduce_mean(x).tolist() == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["ema", "fsq", "simvq"])
def test_two_processes_give_the_gradients_of_one(tmp_path, quantizer):
    (one,) = train(tmp_path, quantizer, 1, 2)
    first, second = train(tmp_path, quantizer, 2, 2)
    for a, b in zip(first["gradients"], second["gradients"], strict=True):  # ranks agree to the bit, for ever
        assert all(torch.equal(a[name], b[name]) for name in a)
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
    # both steps with the weights standing still (Adam divides by the gradient, and with it amplifies rounding)
    assert len(one["gradients"]) == len(first["gradients"]) == 4  # two steps of generator and discriminators
    for ours, theirs in zip(first["gradients"], one["gradients"], strict=True):
        a, b = (torch.cat([g.flatten() for g in run.values()]) for run in (ours, theirs))
        assert relative(b, a) < 1e-5
        for name in theirs:
            assert (ours[name] - theirs[name]).norm() <= 1e-4 * max(theirs[name].norm(), 0.01 * b.norm()), name
    for ours, theirs in zip(first["buffers"], one["buffers"], strict=True):  # codebook, moments of the code
        for name, value in theirs.items():
            assert relative(value, ours[name]) < 1e-5, name
    weights = [run["log"][0]["train/adaptive_weight"] for run in (one, first, second)]
    assert relative(weights[0], weights[1]) < 1e-5
    assert weights[1] == weights[2]
    # and the batches differ
    name = "generator.decoder.head.weight"
    assert relative(one["gradients"][0][name], one["gradients"][2][name]) > 1e-2


LEDGER = """
import sys
import torch.distributed as dist
from errors import InputError
from vq_gan_3d.callbacks import SkipLedger

rank, store, cap = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
ledger = SkipLedger(20, cap, {"known": "known.nii.gz: bad"})
ledger.on_train_batch_end(None, None, None, {"skipped": [(f"case_{rank}", f"case_{rank}.nii.gz: bad")]}, 0)
checkpoint = {}
ledger.on_save_checkpoint(None, None, checkpoint)
try:
    ledger.on_train_epoch_end(None, None)
    print(sorted(ledger.reasons), sorted(checkpoint["skipped"]))
except InputError as error:
    print(error)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("cap", "words"), [(0.2, "['case_0', 'case_1', 'known'] ["), (0.1, "3 of 20 samples")])
def test_what_any_rank_skips_reaches_all(tmp_path, cap, words):
    script = tmp_path / "ledger.py"
    script.write_text(LEDGER)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(number), str(tmp_path / "store"), str(cap)],
            env=environment(), stdout=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert words in out
        assert out.count("case_0") == out.count("case_1")


COHORT = ["dataset.n_patients=8", "dataset.validation=[phantom_00000,phantom_00001]", "hardware.mixed_precision=off"]


@pytest.mark.slow
@pytest.mark.parametrize(("quantizer", "tolerance"), [("fsq", 0.05), ("ema", 0.1)])
def test_the_entry_script_trains_in_two_processes(tmp_path, train, quantizer, tolerance):
    options = [*COHORT, f"model.quantizer={quantizer}", "model.discriminator_iter_start=1"]
    train(*options, "training.max_steps=4", "training.batch_size=2", "output_dir=one")
    run(BASELINE, *options, "training.max_steps=4", "hardware.processes=2", "output_dir=two", cwd=tmp_path)
    train(*options, "training.max_steps=1", "training.batch_size=2", "output_dir=start")
    one, two, start = (load_checkpoint(tmp_path / f"{name}/checkpoints/final.ckpt") for name in ("one", "two", "start"))
    assert int(one["current_model_state"]["steps"]) == int(two["current_model_state"]["steps"]) == 4
    for state in ("current_model_state", "state_dict"):
        # Adam amplifies rounding, and a vector that falls on another code changes a small EMA codebook visibly
        buffers = ("quantizer.", "code_norm.")
        names = [n for n, value in one[state].items() if value.is_floating_point() and not any(b in n for b in buffers)]
        a, b, begin = (torch.cat([run[state][n].flatten().double() for n in names]) for run in (one, two, start))
        moved = (a - begin).norm()
        assert moved > 0
        assert (a - b).norm() < tolerance * moved, state


@pytest.mark.slow
def test_fewer_held_out_volumes_than_processes(tmp_path):
    run(BASELINE, "training.max_steps=2", "hardware.processes=2", "output_dir=two", cwd=tmp_path)
    assert (tmp_path / "two/checkpoints/final.ckpt").exists()
