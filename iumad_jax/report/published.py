"""Results printed in the paper (Long et al., CVPR 2026, tables of the incremental protocols), in percent."""

TITLES = ("I-AUROC", "AUPRO", "FM I-AUROC", "FM AUPRO")


def printed(dataset: str, protocol: str, modality: str, variant: str) -> dict[str, str]:
    """Return the paper's values by title, "-" where the paper has none; empty for other datasets."""
    if dataset not in {key[0] for key in _PRINTED}:
        return {}
    values = _PRINTED.get((dataset, protocol, modality, variant), (None,) * len(TITLES))
    return {title: "-" if value is None else f"{value}" for title, value in zip(TITLES, values, strict=True)}


_PRINTED = {
    ("mvtec3d", "10-0", "rgb", "iuf"): (87.1, 88.5, None, None),
    ("mvtec3d", "9-1", "rgb", "iuf"): (82.4, 85.1, 2.9, 1.5),
    ("mvtec3d", "6-4", "rgb", "iuf"): (76.7, 78.6, 8.3, 6.9),
    ("mvtec3d", "6-1", "rgb", "iuf"): (73.9, 76.3, 12.5, 7.9),
    ("mvtec3d", "10-0", "rgb", "ib_iumad"): (88.9, 89.3, None, None),
    ("mvtec3d", "9-1", "rgb", "ib_iumad"): (85.3, 87.6, 1.8, 1.3),
    ("mvtec3d", "6-4", "rgb", "ib_iumad"): (79.8, 81.2, 6.5, 5.8),
    ("mvtec3d", "6-1", "rgb", "ib_iumad"): (75.7, 80.5, 8.7, 6.3),
    ("mvtec3d", "10-0", "depth", "iuf"): (73.7, 65.4, None, None),
    ("mvtec3d", "9-1", "depth", "iuf"): (70.4, 62.1, 1.6, 1.4),
    ("mvtec3d", "6-4", "depth", "iuf"): (67.4, 59.2, 4.4, 3.6),
    ("mvtec3d", "6-1", "depth", "iuf"): (66.8, 59.7, 4.7, 3.0),
    ("mvtec3d", "10-0", "depth", "ib_iumad"): (75.8, 67.6, None, None),
    ("mvtec3d", "9-1", "depth", "ib_iumad"): (74.9, 65.5, -0.3, 0.7),
    ("mvtec3d", "6-4", "depth", "ib_iumad"): (72.6, 64.3, 1.3, 0.2),
    ("mvtec3d", "6-1", "depth", "ib_iumad"): (71.2, 64.1, 2.2, 1.4),
    ("mvtec3d", "10-0", "rgb+depth", "iuf"): (88.7, 89.2, None, None),
    ("mvtec3d", "9-1", "rgb+depth", "iuf"): (84.2, 86.6, 3.7, 2.2),
    ("mvtec3d", "6-4", "rgb+depth", "iuf"): (79.2, 80.2, 10.6, 7.3),
    ("mvtec3d", "6-1", "rgb+depth", "iuf"): (75.1, 79.5, 15.1, 8.4),
    ("mvtec3d", "10-0", "rgb+depth", "ib_iumad"): (91.0, 90.4, None, None),
    ("mvtec3d", "9-1", "rgb+depth", "ib_iumad"): (87.5, 89.1, 2.3, 0.8),
    ("mvtec3d", "6-4", "rgb+depth", "ib_iumad"): (82.4, 84.7, 6.8, 6.4),
    ("mvtec3d", "6-1", "rgb+depth", "ib_iumad"): (78.6, 82.4, 9.3, 6.9),
    ("eyecandies", "10-0", "rgb", "iuf"): (77.2, 84.0, None, None),
    ("eyecandies", "9-1", "rgb", "iuf"): (73.9, 79.6, 3.8, 3.5),
    ("eyecandies", "6-4", "rgb", "iuf"): (62.9, 68.6, 12.4, 9.1),
    ("eyecandies", "6-1", "rgb", "iuf"): (63.6, 69.1, 10.6, 8.8),
    ("eyecandies", "10-0", "rgb", "ib_iumad"): (78.5, 85.3, None, None),
    ("eyecandies", "9-1", "rgb", "ib_iumad"): (74.1, 83.2, 2.7, 1.1),
    ("eyecandies", "6-4", "rgb", "ib_iumad"): (65.4, 71.2, 8.1, 6.5),
    ("eyecandies", "6-1", "rgb", "ib_iumad"): (66.5, 72.7, 7.3, 5.7),
    ("eyecandies", "10-0", "depth", "iuf"): (57.2, 39.4, None, None),
    ("eyecandies", "9-1", "depth", "iuf"): (55.6, 36.4, 2.1, 0.8),
    ("eyecandies", "6-4", "depth", "iuf"): (51.5, 37.4, 3.8, 1.2),
    ("eyecandies", "6-1", "depth", "iuf"): (51.9, 38.2, 3.0, 1.1),
    ("eyecandies", "10-0", "depth", "ib_iumad"): (59.2, 43.7, None, None),
    ("eyecandies", "9-1", "depth", "ib_iumad"): (57.5, 39.8, 1.4, 1.3),
    ("eyecandies", "6-4", "depth", "ib_iumad"): (52.9, 41.3, 3.5, 1.4),
    ("eyecandies", "6-1", "depth", "ib_iumad"): (53.3, 41.9, 2.6, 0.9),
    ("eyecandies", "10-0", "rgb+depth", "iuf"): (78.4, 85.5, None, None),
    ("eyecandies", "9-1", "rgb+depth", "iuf"): (74.4, 80.3, 4.3, 3.8),
    ("eyecandies", "6-4", "rgb+depth", "iuf"): (64.1, 69.8, 14.3, 8.6),
    ("eyecandies", "6-1", "rgb+depth", "iuf"): (65.8, 71.5, 12.5, 8.8),
    ("eyecandies", "10-0", "rgb+depth", "ib_iumad"): (80.6, 86.1, None, None),
    ("eyecandies", "9-1", "rgb+depth", "ib_iumad"): (76.7, 85.6, 3.2, 1.6),
    ("eyecandies", "6-4", "rgb+depth", "ib_iumad"): (67.8, 73.1, 8.4, 6.7),
    ("eyecandies", "6-1", "rgb+depth", "ib_iumad"): (69.4, 75.1, 7.7, 6.3),
}
