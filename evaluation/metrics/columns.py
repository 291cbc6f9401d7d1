"""Headings and formats under which tables show the figures of `evaluation.metrics.image`."""

IMAGE_COLUMNS = (
    ("psnr_db", "PSNR 3D dB", "{:.2f}"),
    ("psnr_slice_db", "PSNR slice dB", "{:.2f}"),
    ("psnr_pe_window_db", "PSNR PE-window dB", "{:.2f}"),
    ("ssim", "SSIM 3D", "{:.4f}"),
    ("mae_hu", "MAE HU", "{:.1f}"),
    ("bias_hu", "bias HU", "{:+.1f}"),
)
