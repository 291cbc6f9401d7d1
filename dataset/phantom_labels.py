"""Class ids of the phantom's label maps, and the groups of classes that people ask for by one name."""

from __future__ import annotations

LABELS: dict[str, int] = {
    "background": 0,  # air outside the body
    "skin": 1,
    "fat": 2,
    "muscle": 3,  # and every soft tissue without a class of its own
    "breast": 4,  # glandular tissue
    "lung_right": 5,
    "lung_left": 6,
    "effusion": 7,
    "airway": 8,  # lumen
    "rib": 9,
    "spine": 10,
    "sternum": 11,
    "clavicle": 12,
    "scapula": 13,
    "cartilage": 14,  # costal cartilage and intervertebral discs
    "myocardium": 15,
    "right_atrium": 16,
    "right_ventricle": 17,
    "left_atrium": 18,
    "left_ventricle": 19,
    "pulmonary_artery": 20,
    "pulmonary_vein": 21,
    "aorta": 22,  # and the arteries that leave its arch
    "superior_vena_cava": 23,  # and the brachiocephalic veins
    "inferior_vena_cava": 24,
    "embolus": 25,
    "liver": 26,
    "spleen": 27,
    "stomach": 28,
    "stomach_gas": 29,
    "kidney": 30,
    "oesophagus": 31,
}

GROUPS: dict[str, tuple[str, ...]] = {
    "lungs": ("lung_right", "lung_left"),
    "bone": ("rib", "spine", "sternum", "clavicle", "scapula"),
    "heart": ("myocardium", "right_atrium", "right_ventricle", "left_atrium", "left_ventricle"),
    # what the pulmonary artery would be without clots
    "pulmonary_artery_lumen": ("pulmonary_artery", "embolus"),
}
