"""Physical constants and the intensity contract, with units.

Volumes are HU (int16) on disk and ``[0, 1]`` in tensors, mapped by ONE window; see ``dataset.intensity.HUWindow``.
"""

# The HU window of the project: 0 in a tensor is HU_MIN (air), 1 is HU_MAX (dense bone, metal is clipped).
HU_MIN = -1000.0
HU_MAX = 1000.0

HU_AIR = -1000.0
HU_WATER = 0.0

# Display and metric windows as (level, width) in HU.
LUNG_WINDOW = (-600.0, 1500.0)
MEDIASTINUM_WINDOW = (40.0, 400.0)
PE_WINDOW = (100.0, 700.0)  # pulmonary-embolism reading window; PSNR is reported on it too

# The baseline's volume, tensor order [D, H, W] (users write 256×256×64 = W×H×D).
BASELINE_SIZE_DHW = (64, 256, 256)

# Linear attenuation of water at 70 keV, 1/mm: HU = 1000 (mu - mu_water) / mu_water.
MU_WATER_PER_MM = 0.0193
