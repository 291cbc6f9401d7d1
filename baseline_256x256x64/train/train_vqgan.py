"""Train the 3D VQ-GAN on whole thoraces of 256×256×64 voxels.

python train/train_vqgan.py dataset=nifti dataset.root_dir=/folder/of/nii.gz training.num_epochs=50
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
