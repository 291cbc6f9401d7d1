"""Trees that fill the lungs: pulmonary arteries, the bronchi beside them, veins; and where emboli lodge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dataset.phantom_splat import Segments

if TYPE_CHECKING:
    from dataset.phantom_anatomy import Anatomy

GENERATIONS = 11  # 2048 ends per lung, some 0.8 mm thick
BRONCHUS_GENERATIONS = 7
# Murray's law has 3; a little less thins the tree faster, as in lungs.
BRANCHING_EXPONENT = 2.85


@dataclass(frozen=True)
class LungTrees:
    """Branches of both lungs.

    Attributes:
        arteries: pulmonary artery beyond the hila.
        veins: pulmonary veins before the atrium's inlets.
        bronchi: lumina, side by side with the arteries.
    """

    arteries: Segments
    veins: Segments
    bronchi: Segments


def grow_tree(
    starts: np.ndarray, radius_mm: float, points: np.ndarray, rng: np.random.Generator
) -> tuple[Segments, np.ndarray]:
    """A tree that fills a cloud of points: each territory is halved, and a branch goes towards each half's middle.

    Args:
        starts: (T, 3) mm, the trunks.
        radius_mm: radius of a trunk.
        points: (T, 2**k, 3) mm, the territories of the trunks.
        rng: source of all irregularity.

    Returns:
        The segments in breadth-first order, and the parent of each (N,), -1 at the trunks.
    """
    groups, tip = points, starts
    radius = np.full(len(starts), radius_mm)
    parent = np.full(len(starts), -1)
    parts: list[Segments] = []
    parents: list[np.ndarray] = []
    n_made, generation = 0, 0
    while groups.shape[1] > 1:
        n, m, _ = groups.shape
        middle = groups.mean(axis=1, keepdims=True)
        centred = groups - middle
        # split across the longest direction of the territory, tilted at random
        _, axes = np.linalg.eigh(np.einsum("gmi,gmj->gij", centred, centred))
        normal = axes[:, :, 2] + 0.18 * rng.standard_normal((n, 3))
        order = np.argsort(np.einsum("gmi,gi->gm", centred, normal), axis=1)
        groups = np.take_along_axis(groups, order[:, :, None], axis=1).reshape(2 * n, m // 2, 3)
        # the member next to the middle is inside the lung even where the territory wraps around the heart
        middle = groups.mean(axis=1, keepdims=True)
        nearest = np.square(groups - middle).sum(axis=2).argmin(axis=1)
        inner = groups[np.arange(2 * n), nearest]
        goal = 0.5 * (middle[:, 0] + inner)
        tip, parent = np.repeat(tip, 2, axis=0), np.repeat(parent, 2)
        share = rng.uniform(0.36, 0.56, (2 * n, 1)) if groups.shape[1] > 1 else 0.9
        end = tip + share * (goal - tip)
        end += 0.03 * np.linalg.norm(goal - tip, axis=1, keepdims=True) * rng.standard_normal((2 * n, 3))
        r0 = np.repeat(radius, 2) * 2.0 ** (-1.0 / BRANCHING_EXPONENT) * rng.uniform(0.86, 1.12, 2 * n)
        parts.append(Segments(tip, end, r0, 0.9 * r0, np.full(2 * n, generation)))
        parents.append(parent)
        parent = n_made + np.arange(2 * n)
        n_made += 2 * n
        tip, radius = end, r0
        generation += 1
    return Segments.join(parts), np.concatenate(parents)


def beside(arteries: Segments, parent: np.ndarray, root: np.ndarray, side: np.ndarray, scale: float) -> Segments:
    """Bronchi that follow the first generations of an arterial tree at touching distance on one side."""
    keep = arteries.generation < BRONCHUS_GENERATIONS
    tree, parent = arteries.select(keep), parent[keep]
    radius = scale * tree.radius_end
    end = tree.end + side * (1.1 * (tree.radius_end + radius) + 0.8)[:, None]
    start = np.where(parent[:, None] < 0, root, end[np.maximum(parent, 0)])
    return Segments(start, end, scale * tree.radius_start, radius, tree.generation)


def lung_points(anatomy: Anatomy, rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """``n`` random points (n, 3) mm in each lung, some millimetres under the pleura."""
    torso = anatomy.torso
    sx, sy, sz = torso.scale
    found: dict[str, list[np.ndarray]] = {"right": [], "left": []}
    low = np.array([0.0, -98.0 * sy, torso.dome_left_mm - 80.0 * sz])
    high = np.array([142.0 * sx, 92.0 * sy, torso.apex_mm])
    while any(sum(map(len, part)) < n for part in found.values()):
        points = rng.uniform(low, high, (2 * n, 3))
        for name, side in (("right", -1.0), ("left", 1.0)):
            there = points * [side, 1.0, 1.0]
            found[name].append(there[anatomy.lung_distance(there) < -2.5])
    return {name: np.concatenate(parts)[:n] for name, parts in found.items()}


def grow_lung_trees(anatomy: Anatomy, rng: np.random.Generator) -> LungTrees:
    """Arteries, bronchi and veins of both lungs, rooted at the hila of the anatomy."""
    patient, hila = anatomy.patient, anatomy.hila
    n = 2**GENERATIONS
    points = lung_points(anatomy, rng, 2 * n)
    arteries, veins, bronchi = [], [], []
    for name, sign in (("right", -1.0), ("left", 1.0)):
        tree, parent = grow_tree(
            hila[f"artery_{name}"][None], 0.33 * patient.pa_diameter_mm, points[name][None, :n], rng
        )
        arteries.append(tree)
        side = np.array([-0.35 * sign, 0.85, -0.15])
        bronchi.append(beside(tree, parent, hila[f"airway_{name}"], side / np.linalg.norm(side), 0.72))
        cloud = points[name][n:]
        # an upper and a lower vein share the lung along the oblique fissure
        order = np.argsort(cloud @ [0.0, -0.66, 0.75])[::-1]
        halves = cloud[order].reshape(2, n // 2, 3)
        veins.append(grow_tree(hila[f"veins_{name}"], 6.4, halves, rng)[0])
    return LungTrees(Segments.join(arteries), Segments.join(veins), Segments.join(bronchi))


def choose_emboli(anatomy: Anatomy, rng: np.random.Generator) -> Segments:
    """Clots as thick lines inside arteries: the first in a large artery, the others anywhere down to segmental size.

    Returns:
        Segments with the clots' radii; empty for a patient without embolism.
    """
    patient, arteries = anatomy.patient, anatomy.trees.arteries
    starts, ends, radii = [], [], []
    n_tree = len(arteries.start) // 2
    for i in range(patient.n_emboli):
        lung = int(rng.integers(2))
        central = rng.random() < 0.25 + 0.5 * patient.clot_burden if i == 0 else rng.random() < 0.15
        share = rng.uniform(0.5, 0.8) if rng.random() < 0.65 else 1.0
        if central:
            # the outer half of a main branch, from where the clot trails into the hilum
            tube = anatomy.pulmonary_trunks[1 + lung]
            first = len(tube.points) // 2
            line, radius = tube.points[first:], float(tube.radii[first:].min())
        else:
            generation = 0 if i == 0 else int(rng.choice([0, 1, 2, 3, 4], p=[0.2, 0.28, 0.24, 0.18, 0.1]))
            k = int(rng.integers(2 ** (generation + 1)))
            first = lung * n_tree + (2 ** (generation + 1) - 2) + k
            # it rides on the next fork: on into one of the two branches
            onward = lung * n_tree + (2 ** (generation + 2) - 2) + 2 * k + int(rng.integers(2))
            line = np.stack([arteries.start[first], arteries.end[first], arteries.end[onward]])
            radius = float(arteries.radius_start[first])
        r = 0.9 * share * radius
        aside = rng.standard_normal(3)
        aside *= rng.uniform(0.0, 1.0) * (0.92 * radius - r) / np.linalg.norm(aside)
        starts.append(line[:-1] + aside)
        ends.append(line[1:] + aside)
        radii.append(np.full(len(line) - 1, r))
    if not starts:
        empty = np.zeros((0, 3))
        return Segments(empty, empty, np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64))
    radius_all = np.concatenate(radii)
    return Segments(
        np.concatenate(starts), np.concatenate(ends), radius_all, radius_all, np.zeros(len(radius_all), dtype=np.int64)
    )
