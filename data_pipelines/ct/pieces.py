"""Labels in pieces: specks are ignored and said, a large second piece is refused, and levels follow each other along the spine."""

import pathlib

import numpy as np
import scipy
from absl import logging

from radgs_jax import errors
from radgs_jax import levels

SPECK_MM3 = 1000.0
"""Largest volume in mm^3 of a piece that may be a speck: a cube of 10 mm. Automatic masks leave pieces of 1 to 500, the smallest
vertebra has 5,000. At half, more islands are refused; at twice, tips of processes are dropped."""
SPECK_SHARE = 0.05
"""Largest volume of a speck as a share of its label's largest piece, so that specks of small masks are small. At half, islands in
small children are refused; at twice, their processes are dropped."""
NEAR_MM = 4.0
"""Largest gap in mm between the voxel centres of two pieces of one vertebra: an arch that has come loose, a fracture. Discs are
higher. At half, coarse masks with a crack are refused; at twice, half a neighbour counts as a part."""
SWAP_MM = 5.0
"""Height in mm by which a level may lie above the next higher one. The smallest distance of levels is 10 mm, and centres of boxes
differ from those of bodies by some mm. At half, steep spines come near; at twice, swapped levels of children pass."""
MISSING_PITCHES = 1.6
"""Distance of two levels that follow each other, in usual distances, from which a vertebra seems to be missing between them; two
are exactly 2. At half, every level is said; at 2 or more none is."""
CLOSE_PITCHES = 0.62
"""Distance of two levels between which others are missing, as a share of the usual distance of these, below which there is no room
for them. Of two levels without the one between it is 0.5. At half, none is said; at twice, all are."""
MAX_SEARCHED = 2**27
"""Voxels of a mask's box up to which it is searched for pieces; a search takes 4 bytes a voxel. Without specks far off, a
vertebra's box has 10 million voxels at 0.5 mm. At half, fine scans are not searched, at twice, a search may take a gigabyte."""
_TOUCHING = np.ones((3, 3, 3), bool)
"""Voxels that touch by a face, an edge or a corner belong together."""

Boxes = dict[int, tuple[slice, ...]]


def boxes(labels: np.ndarray) -> Boxes:
    """Bounding box, as a tuple of slices, of each label above 0 in an integer array."""
    # In memory order, which differs from C order once axes were permuted: six times faster.
    order = np.argsort(np.abs(labels.strides))[::-1]
    ordered, back = labels.transpose(order), np.argsort(order)
    # Most of a scan is no bone: a spine's columns of voxels are found ten times faster than its labels.
    seen = ordered.max(0, initial=0)
    columns = [np.flatnonzero(seen.any(1 - axis)) for axis in range(2)]
    if not len(columns[0]):
        return {}
    first = [0, *(int(c[0]) for c in columns)]
    held = ordered[:, first[1] : columns[0][-1] + 1, first[2] : columns[1][-1] + 1]
    found = enumerate(scipy.ndimage.find_objects(held), 1)
    moved = lambda box: [slice(part.start + a, part.stop + a) for part, a in zip(box, first)]
    return {label: tuple(moved(box)[axis] for axis in back) for label, box in found if box is not None}


def border_axis(box: tuple[slice, ...], shape: tuple[int, ...]) -> int | None:
    """The first axis on which a bounding box touches the border of an array of the given shape, or None."""
    touched = (axis for axis, (part, size) in enumerate(zip(box, shape)) if part.start == 0 or part.stop == size)
    return next(touched, None)


def clean(path: pathlib.Path | str, labels: np.ndarray, affine: np.ndarray) -> Boxes:
    """Removes specks from a label map in place, and says so in one line.

    A speck is a piece of a label apart from its largest piece, of SPECK_MM3 and SPECK_SHARE at most, or a label of which there is
    no more than that beside the other labels. Larger pieces stay if they are within NEAR_MM of the largest one, if the scan's
    border cuts both, or if the bone is made of several (sacrum and coccyx).

    Args:
      path: the label map's file, named in what is said.
      labels: (X, Y, Z) uint8, changed.
      affine: (4, 4), mm of voxel centres.

    Returns:
      The bounding boxes of the labels that are left.

    Raises:
      InputError: a label has a second piece that is none of these.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    voxel = abs(np.linalg.det(affine[:3, :3]))
    found, counts, specks = boxes(labels), {}, {}
    for label, box in list(found.items()):
        mask = labels[box] == label
        parts = _parts(mask)
        if len(parts) < 2:
            counts[label] = int(np.count_nonzero(mask))
            continue
        sizes = np.array([len(part) for part in parts])
        order = np.argsort(-sizes, kind="stable")
        counts[label] = int(sizes[order[0]])
        small = (sizes * voxel <= SPECK_MM3) & (sizes <= SPECK_SHARE * sizes.max())
        large = [parts[n] + [s.start for s in box] for n in order if not small[n]]
        if len(large) > 1 and label not in (levels.SACRUM, levels.COCCYX):
            _check_pieces(path, label, labels.shape, large, spacing, voxel)
        if small.any():
            for n in np.flatnonzero(small):
                labels[tuple((parts[n] + [s.start for s in box]).T)] = 0
            specks[label] = (int(small.sum()), int(sizes[small].sum()))
            low, high = (f([f(part, axis=0) for part in large], axis=0) for f in (np.min, np.max))
            found[label] = tuple(slice(int(a), int(b) + 1) for a, b in zip(low, high))
    usual = float(np.median(list(counts.values()))) if counts else 0.0
    for label, count in counts.items():
        if count * voxel <= SPECK_MM3 and count <= SPECK_SHARE * usual:
            box = found.pop(label)
            labels[box][labels[box] == label] = 0
            number, voxels = specks.get(label, (0, 0))
            specks[label] = (number + 1, voxels + count)
    if specks:
        number, voxels = (sum(n[k] for n in specks.values()) for k in (0, 1))
        names = ", ".join(levels.level_name(label) for label in specks)
        pieces = f"{number} speck{'s' * (number > 1)} of {names}"
        size = f"{voxels} voxel{'s' * (voxels > 1)}, {voxels * voxel:.3g} mm3"
        logging.warning("%s: labels: %s (%s), ignored", path, pieces, size)
    return found


def _parts(mask):
    """The connected parts of a mask (X, Y, Z), each as the indices (N, 3) of its voxels; nothing if there is only one."""
    parts = []
    # Where planes are empty a mask falls apart, so that far specks do not cost a search through all that lies between.
    blocks = _blocks(mask)
    for block in blocks:
        if mask[block].size > MAX_SEARCHED:
            numbers, count = mask[block].astype(np.int8), 1
        else:
            numbers, count = scipy.ndimage.label(mask[block], _TOUCHING)
        if len(blocks) == count == 1:
            return []
        index = np.argwhere(numbers) + [s.start for s in block]
        which = numbers[numbers > 0]
        order = np.argsort(which, kind="stable") if count > 1 else slice(None)
        parts += np.split(index[order], np.cumsum(np.bincount(which)[1:-1]))
    return parts


def _blocks(mask, start=(0, 0, 0)):
    """Boxes in a mask, as tuples of slices, that hold all of it and between which a plane is empty."""
    for axis in range(3):
        full = mask.any(tuple(n for n in range(3) if n != axis))
        edges = np.flatnonzero(np.diff(np.concatenate([[False], full, [False]]).astype(np.int8)))
        runs = list(zip(edges[::2], edges[1::2]))
        if len(runs) > 1 or runs and runs[0] != (0, len(full)):
            found = []
            for low, high in runs:
                inner = [slice(None)] * 3
                inner[axis] = slice(low, high)
                moved = tuple(s + low * (n == axis) for n, s in enumerate(start))
                found += _blocks(mask[tuple(inner)], moved)
            return found
    return [tuple(slice(int(s), int(s) + n) for s, n in zip(start, mask.shape))] if mask.any() else []


def _check_pieces(path, label, shape, parts, spacing, voxel):
    """Refuses a label whose parts, indices (N, 3), the largest first, do not belong together."""

    def cut(part):
        return bool((part == 0).any() or (part == np.array(shape) - 1).any())

    main, *others = parts
    tree = scipy.spatial.cKDTree(main * spacing)
    near = max(NEAR_MM, 1.5 * float(spacing.max()))
    for part in others:
        gap = float(tree.query(part * spacing)[0].min())
        name, sizes = f"label {label} ({levels.level_name(label)})", (len(main), len(part))
        both = f"{sizes[0] * voxel:.0f} and {sizes[1] * voxel:.0f} mm3"
        if gap <= near:
            logging.warning("%s: %s: two pieces of %s, %.1f mm apart, taken as one vertebra", path, name, both, gap)
        elif not (cut(main) and cut(part)):
            found = f"two pieces of {both} ({sizes[0]} and {sizes[1]} voxels), {gap:.0f} mm apart"
            wanted = f"one piece: remove or relabel the one that is not {levels.level_name(label)}"
            errors.fail(path, name, found, wanted)


def check_order(path: pathlib.Path | str, found: Boxes, shape: tuple[int, ...], affine: np.ndarray) -> None:
    """Checks that levels follow each other from head to feet, and says where the labels skip one.

    Args:
      path: the label map's file, named in what is said.
      found: bounding box of each label.
      shape, affine: (3,) and (4, 4) mm of the label map, axes nearest to RAS+.

    Raises:
      InputError: a complete level lies more than SWAP_MM above one that is higher up in the spine.
    """
    present = levels.in_order(found)
    centres = {n: affine[:3] @ [*[0.5 * (s.start + s.stop - 1) for s in found[n]], 1.0] for n in present}
    whole = [n for n in present if border_axis(found[n], shape) is None]
    for upper, lower in zip(whole, whole[1:]):
        if centres[lower][2] > centres[upper][2] + SWAP_MM:
            names = levels.level_name(upper), levels.level_name(lower)
            heights = f"{names[0]} at {centres[upper][2]:.0f} mm, below {names[1]} at {centres[lower][2]:.0f} mm"
            wanted = f"{names[0]} above {names[1]}: right labels, a word on their order (--labels), or a right affine"
            errors.fail(path, "labels", heights, wanted)
    vertebrae = [n for n in present if n in levels.VERTEBRAE]
    said = _skipped(vertebrae, centres)
    if said:
        logging.warning("%s: labels: %s", path, "; ".join(said))


def _skipped(present, centres):
    """What to say of levels that are not labelled, and of gaps, a few words each."""
    pairs = list(zip(present, present[1:]))
    apart = {pair: float(np.linalg.norm(centres[pair[0]] - centres[pair[1]])) for pair in pairs}
    next_to = [pair for pair in pairs if levels.steps(*pair, present) == 1]
    ratios = [apart[pair] / levels.pitch_mm(*pair, present) for pair in next_to]
    # The patient's own size, as far as levels that follow each other show it.
    scale = float(np.median(ratios)) if len(ratios) > 1 else 1.0
    said = []
    for pair in pairs:
        usual = scale * levels.pitch_mm(*pair, present)
        names = f"{levels.level_name(pair[0])} and {levels.level_name(pair[1])}"
        between = levels.steps(*pair, present) - 1
        if between and apart[pair] < CLOSE_PITCHES * usual:
            said.append(f"no room for the {between} between {names}, {apart[pair]:.0f} mm apart: is a number skipped?")
        elif between:
            said.append(f"{between} not labelled between {names}, {apart[pair]:.0f} mm apart")
        elif apart[pair] > MISSING_PITCHES * usual:
            said.append(f"room for another between {names}, {apart[pair]:.0f} mm apart: is one not labelled?")
    return said
