"""Train a 3D classifier of pulmonary embolism on volumes, or on the latents of a frozen 3D VQ-GAN.

python ddpm/classifier/train_classifier.py dataset=rspect dataset.root_dir=/folder dataset.size=[64,128,128]
"""

import sys
from pathlib import Path

from vq_gan_3d.command import run_training


def main() -> int:
    """Compose the configuration and train; returns the exit code."""
    from ddpm.classifier.stage import train

    return run_training(Path(__file__).resolve().parent / "config", train)


if __name__ == "__main__":
    sys.exit(main())
