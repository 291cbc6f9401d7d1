"""Reconstruct cases at full resolution, to look at: NIfTI on the input's grid, PNG panels and short videos.

python train/generate_samples.py --checkpoint outputs/checkpoints/final.ckpt --num_samples 10
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from errors import run_command
from patchwise_512x512x604.options import add_arguments


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--num_samples", type=int, default=10, help="cases at most (default: 10)")
    parser.add_argument("--data_dir", type=Path, help="folder of .nii.gz or .b2nd (default: held-out cases of the run)")
    parser.add_argument("--output", type=Path, help="folder (default: sample_reconstructions in the run)")
    parser.add_argument("--video_frames", type=int, default=48, help="frames of each video, 0: none (default: 48)")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Write what was asked for; 4 if some cases could not be read."""
    from dataset.atomic import make_folder
    from dataset.volume_io import Volume, write_nifti
    from errors import ConfigurationError
    from evaluation.panels import comparison_panel
    from evaluation.video import comparison_video
    from patchwise_512x512x604 import evaluation_set as shared
    from patchwise_512x512x604.utils.scratch import ScratchVolume

    say = shared.start_logging()
    if arguments.num_samples < 1:
        raise ConfigurationError(f"--num_samples {arguments.num_samples}: give a positive number of cases")
    if arguments.video_frames < 0:
        raise ConfigurationError(f"--video_frames {arguments.video_frames}: give a number of frames, 0 for no video")
    if arguments.data_dir is None:
        cases = shared.held_out_cases(arguments.checkpoint)
    else:
        cases = shared.find_cases(arguments.data_dir)
    model = shared.load_model(arguments)
    folder = arguments.output or shared.run_of(arguments.checkpoint) / "sample_reconstructions"
    make_folder(folder)
    loop = shared.CaseLoop()
    for case, volume in loop.over(cases[: arguments.num_samples]):
        shape = volume.hu.shape
        # both on the disk: NIfTI and pictures want planes of all directions, of which a store gives none quickly
        with ScratchVolume(folder, shape) as restored, ScratchVolume(folder, shape) as shown:
            result = model.reconstruct_beside(volume.hu, restored, shown)
            after, before = restored.array(), shown.array()
            saved = Volume(after, volume.affine, source=case.name, orientation=volume.orientation)
            write_nifti(folder / f"{case.name}.nii.gz", saved)
            comparison_panel(before, after, volume.spacing_mm, folder / f"{case.name}.png")
            if arguments.video_frames:
                video = folder / f"{case.name}.webp"
                comparison_video(before, after, volume.spacing_mm, video, frames=arguments.video_frames)
        say(f"{case.name}: {'×'.join(str(n) for n in shape[::-1])} in {result.seconds:.1f} s")
    say(f"volumes, pictures and videos: {folder}")
    return loop.exit_code


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
