"""What people see in a picture: every setting, each as itself, also with colour-blind eyes."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from orpo_lab.compare import pictures
from orpo_lab.compare.evidence import Setting

# How colours look to them, in linear RGB (Machado, Oliveira and Fernandes 2009, severity 1.0)
EYES = {
    "usual": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# From linear RGB to CIE XYZ, and its white (D65)
TO_XYZ = [[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07217], [0.01933, 0.11919, 0.95030]]
WHITE = np.array([0.95047, 1.0, 1.08883])


def settings(betas: list[float], schedules: list[str], rates: list[float]) -> list[Setting]:
    """Return settings in the order of a comparison."""
    return [
        Setting(f"{schedule} {beta} {rate}", {"beta": beta, "beta_schedule": schedule}, [])
        for schedule, beta, rate in itertools.product(schedules, betas, rates)
    ]


def linear(colours: Sequence[str]) -> Any:
    """Return colours in linear RGB, [N, 3]."""
    rgb = np.array([to_rgb(colour) for colour in colours])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def distances(colours: Sequence[str], eyes: Any) -> list[float]:
    """Return how far any two colours are apart in CIELAB (2.3 is just noticeable side by side)."""
    xyz = np.clip(linear(colours) @ np.transpose(eyes), 0, 1) @ np.transpose(TO_XYZ) / WHITE
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    return [float(np.linalg.norm(point - other)) for point, other in itertools.combinations(lab, 2)]


BETAS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("eyes", EYES)
def test_eight_settings_are_told_apart_by_their_colours_alone(eyes: str) -> None:
    looks = pictures._looks(settings(BETAS, ["constant"], [1e-4]))
    assert min(distances([look.colour for look in looks], EYES[eyes])) > 20


def test_every_colour_is_readable_on_white_and_darker_ones_come_first() -> None:
    luminance = linear(pictures.COLOURS) @ TO_XYZ[1]
    assert 1.05 / (luminance.max() + 0.05) > 2
    assert list(luminance) == sorted(luminance)


@pytest.mark.parametrize(
    ("betas", "schedules", "rates"),
    [
        (BETAS, ["constant", "cosine"], [1e-4]),
        ([0.1], ["constant"], [1e-5, 1e-4, 1e-3]),
        ([0.1, 0.2], ["constant", "linear", "step"], [1e-5, 1e-4, 1e-3]),
        (BETAS, ["constant"], [1e-5, 1e-4]),
    ],
)
def test_no_two_settings_look_alike(
    betas: list[float], schedules: list[str], rates: list[float]
) -> None:
    compared = settings(betas, schedules, rates)
    looks = pictures._looks(compared)
    assert len({(look.colour, look.is_light, look.line) for look in looks}) == len(compared)
    assert len({(look.colour, look.is_light, look.marker) for look in looks}) == len(compared)
    by_beta: dict[float, set[str]] = {}
    for setting, look in zip(compared, looks, strict=True):
        by_beta.setdefault(setting.values["beta"], set()).add(look.colour)
    assert {len(colours) for colours in by_beta.values()} == {len(rates)}, "whatever the schedule"


def test_two_settings_are_the_darkest_and_the_lightest() -> None:
    looks = pictures._looks(settings([0.1, 0.2], ["constant"], [1e-4]))
    assert [look.colour for look in looks] == [pictures.COLOURS[0], pictures.COLOURS[-1]]


@pytest.mark.parametrize("length", [10, 60, 150])
@pytest.mark.parametrize("num", [2, pictures.MAX_LABELS])
def test_a_legend_hides_nothing_and_lies_within_the_picture(num: int, length: int) -> None:
    compared = [Setting(f"{number} " + "long " * (length // 5), {}, []) for number in range(num)]
    figure, axes = pictures._figure(compared, height=3.2)
    for setting in compared:
        axes.plot([0, 1], [0, 1], label=pictures._label(setting))
    axes.set_xlabel("optimizer step")
    pictures._png(figure, compared)
    ((left, bottom), (right, top)) = figure.legends[0].get_window_extent().get_points()
    assert axes.get_window_extent().height > 2.2 * figure.dpi
    assert top <= axes.xaxis.label.get_window_extent().y0
    assert bottom >= 0
    assert left >= 0
    assert right <= figure.bbox.width
