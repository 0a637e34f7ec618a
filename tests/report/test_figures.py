import json
import xml.etree.ElementTree as ET
from importlib.resources import files

import numpy as np
import pytest

from anemoi_dist.report.figures import Chart, Curve, Field, draw_chart, draw_map, equal_earth

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def chart(**options):
    return Chart(**{"name": "c", "alt": "a <b> & c", "curves": [Curve("loss", [1, 2, 3], [3.0, 2.0, 1.0])], **options})


def test_a_chart_is_xml_with_a_text_for_readers_and_the_colours_of_its_page():
    svg = draw_chart(chart())
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "a <b> & c"
    assert root.get("viewBox")
    assert root.get("width") is None
    assert "var(--series-0)" in svg
    assert "#1011" not in svg


def test_two_drawings_of_a_chart_are_the_same_text():
    assert draw_chart(chart()) == draw_chart(chart())


def test_names_in_one_page_do_not_clash():
    def identifiers(name):
        root = ET.fromstring(draw_chart(chart(name=name)))
        return {element.get("id") for element in root.iter() if element.get("id")}

    assert identifiers("a") & identifiers("b") == set()


def test_a_name_with_markup_is_text():
    curves = [Curve("<script>", [1, 2], [1.0, 2.0]), Curve("$x_1$", [1, 2], [1.0, 3.0])]
    svg = draw_chart(chart(curves=curves))
    assert {"<script>", "$x_1$"} <= set(texts(svg))
    assert "<script>" not in svg


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 1e-5], {"1", "0.001", "1e-5"}), ([0.9, 0.2], {"0.2", "0.5"}), ([3.4, 9.1], {"4", "5", "6", "8"})],
)
def test_a_log_scale_has_round_numbers(values, expected):
    shown = texts(draw_chart(chart(curves=[Curve("", [0, 1], values)], scale="log", x_ticks=[0, 1])))
    assert expected <= set(shown)


def test_a_decay_rate_is_drawn_by_its_distance_from_one():
    curve = Curve("beta3", [0, 1, 2], [0.9, 0.999, 0.9999])
    assert {"0.9", "0.99", "0.999", "0.9999"} <= set(texts(draw_chart(chart(curves=[curve], scale="decay"))))


def test_marks_are_named():
    shown = texts(draw_chart(chart(restarts=[2], skipped=[1, 3])))
    assert shown.count("resumed") == shown.count("update skipped") == 1
    assert "resumed" not in texts(draw_chart(chart()))


def test_gaps_and_single_points_are_drawn():
    curve = Curve("loss", [1, 2, 3, 4], [3.0, float("nan"), 1.0, 2.0])
    assert "nan" not in draw_chart(chart(curves=[curve], smooth=True, scale="log")).lower()
    assert "<use" in draw_chart(chart(curves=[Curve("loss", [1], [3.0])], x_ticks=[1]))


def field(**options):
    values = {
        "name": "m", "alt": "map", "title": "Error +6 h", "values": np.ones((5, 8)).cumsum(axis=1) - 4.5,
        "latitudes": np.linspace(90, -90, 5), "longitudes": np.arange(0, 360, 45.0), "limits": (-4.0, 4.0),
        "unit": "msl, hPa", "diverging": True,
    }  # fmt: skip
    return Field(**{**values, **options})


def test_a_map_has_title_unit_and_a_scale_around_zero():
    svg = draw_map(field())
    shown = texts(svg)
    assert {"Error +6 h", "msl, hPa", "0", "-4", "4"} <= set(shown)
    assert 'xlink:href="data:image/png;base64,' in svg


@pytest.mark.parametrize("diverging", [True, False])
def test_a_region_is_a_map_too(diverging):
    svg = draw_map(field(latitudes=np.linspace(60, 40, 5), longitudes=np.linspace(0, 14, 8) % 360, diverging=diverging))
    assert ET.fromstring(svg).get("aria-label") == "map"


def test_a_constant_field_is_drawn():
    assert "<svg" in draw_map(field(values=np.zeros((5, 8)), diverging=False))


def test_equal_earth_keeps_areas_and_symmetry():
    def area(south, north):
        latitudes = np.linspace(south, north, 2001)
        x, y = equal_earth(np.full_like(latitudes, 10.0), latitudes)
        return np.trapezoid(x, y)

    expected = np.radians(10) * (np.sin(np.radians(60)) - np.sin(np.radians(30)))
    # The published polynomial is equal-area up to the choice of its unit.
    unit = area(0, 90) / np.radians(10)
    assert area(30, 60) / unit == pytest.approx(expected, rel=1e-4)
    x, y = equal_earth(np.array([-180.0, 0.0, 180.0]), np.array([0.0, 90.0, 0.0]))
    assert x == pytest.approx([-2.70663, 0, 2.70663], abs=1e-4)
    assert y == pytest.approx([0, 1.31737, 0], abs=1e-4)


def test_the_coastlines_are_small_credited_and_on_earth():
    text = (files("anemoi_dist.report") / "coastlines.geojson").read_text()
    document = json.loads(text)
    assert len(text) < 60_000
    assert "public domain" in document["credit"]
    points = np.concatenate([np.asarray(line) for line in document["features"][0]["geometry"]["coordinates"]])
    assert np.abs(points).max(axis=0).tolist() <= [180, 90]
    assert len(points) > 3000
