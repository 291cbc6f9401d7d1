"""Train the diffusion model on the latents of a frozen 3D VQ-GAN.

python train/train_ddpm.py pretrained_vqgan=outputs/checkpoints/final.ckpt dataset=nifti dataset.root_dir=/folder
"""

import sys
from pathlib import Path

from vq_gan_3d.command import run_training


def main() -> int:
    """Compose the configuration and train; returns the exit code."""
    from ddpm.stage import train

    return run_training(Path(__file__).resolve().parents[1] / "config", train)


if __name__ == "__main__":
    sys.exit(main())
