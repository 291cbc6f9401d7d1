"""Train the 3D VQ-GAN on 256×256×128 patches of native-resolution volumes, on one GPU or many.

python train/train_vqgan_distributed.py dataset.root_dir=/folder/of/nii.gz training.batch_size=4
"""

import sys
from pathlib import Path

from vq_gan_3d.command import run_training


def main() -> int:
    """Compose the configuration and train; returns the exit code."""
    from vq_gan_3d.runner import train

    return run_training(Path(__file__).resolve().parents[1] / "config", train)


if __name__ == "__main__":
    sys.exit(main())
