"""Pictures of a race, by what stands on their axes."""

import itertools

import pytest
from matplotlib.text import Text

from quadric.lab import plots


def series(y, **rest):
    x = [float(i) for i in range(1, len(y) + 1)]
    return plots.Series("A", plots.Style("ours-0"), x=x, y=y, low=y, high=y, **rest)


def test_spread_out_keeps_order_distance_and_centre():
    moved = plots.spread_out([0.5, 0.1, 0.52, 0.51], 0.1)
    assert moved[1] == 0.1
    assert sorted(moved) == [moved[1], moved[0], moved[3], moved[2]]
    assert moved[2] - moved[3] == pytest.approx(0.1)
    assert sum(moved[i] for i in (0, 2, 3)) == pytest.approx(0.5 + 0.51 + 0.52)


def test_styles_tell_all_apart_and_ours_are_solid():
    looks = plots.styles([True, False, True, False, False, True, False, True, True])
    assert len({look.colour for look in looks}) == 9
    assert [bool(look.dashes) for look in looks] == [False, True, False, True, True, False, True, False, False]


def test_light_colours_are_told_apart_by_value():
    assert len({light for light, _ in plots.THEME.values()}) == len(plots.THEME)


def test_a_long_name_leaves_room_for_the_curves():
    figure = plots.curves(
        [plots.Series("x" * 200, plots.Style("ours-0"), [1.0], [0.5], [0.5], [0.5])], x="steps", y="loss"
    )
    (text,) = figure.axes[0].texts
    assert text.get_text() == "x" * 21 + "…"


def test_zoom_leaves_out_the_beginning_but_neither_target_nor_end():
    y = [10.0, 50.0, 90.0, *[97.0 + 0.01 * i for i in range(37)]]
    (axes,) = plots.curves([series(y)], x="steps", y="accuracy", target=99.0, zoom=True).axes
    low, high = axes.get_ylim()
    assert 90 < low < 97.1
    assert high > 99.0
    (axes,) = plots.curves([series(y)], x="steps", y="accuracy").axes
    assert axes.get_ylim()[0] < 10


@pytest.mark.parametrize(("y", "scale"), [([1.0, 0.1], "log"), ([1.0, 0.5], "linear"), ([1.0, -0.1], "linear")])
def test_loss_is_logarithmic_where_that_helps(y, scale):
    (axes,) = plots.curves([series(y)], x="steps", y="loss", log=True).axes
    assert axes.get_yscale() == scale


def test_a_lost_run_ends_in_a_cross_inside_the_axes_however_far_it_flew():
    broken = [([1.0, 2.0], [1.0, 1e30])]
    (axes,) = plots.curves([series([1.0, 0.5], broken=broken)], x="steps", y="loss").axes
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert cross.get_ydata()[0] == axes.get_ylim()[1] < 2


def test_names_at_the_ends_do_not_overlap():
    same = [plots.Series(f"N{i}", plots.Style("ours-0"), [1.0], [0.5], [0.5], [0.5]) for i in range(5)]
    figure = plots.curves(same, x="steps", y="accuracy")
    plots.png(figure)
    boxes = sorted((Text.get_window_extent(text) for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 5
    assert all(above.y0 >= below.y0 + 0.7 * below.height for below, above in itertools.pairwise(boxes))


def test_tuning_shows_the_chosen_and_the_diverged():
    trials = plots.Trials("A", plots.Style("ours-0"), [0.1, 0.2, 0.4], [0.5, 0.4, 900.0], [0.8], 0.2)
    (axes,) = plots.tuning([trials]).axes
    (crosses,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert sorted(crosses.get_xdata()) == [0.4, 0.8]  # far off the scale counts as lost
    (ring,) = [line for line in axes.lines if line.get_markersize() == 9]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (0.2, 0.4)


def test_the_target_is_named_above_the_axes_where_no_curve_can_be():
    (axes,) = plots.curves([series([1.0, 2.0, 3.0])], x="steps", y="accuracy", target=2.5).axes
    assert axes.get_title(loc="right") == "dotted: 2.5, the target"


def test_rates_over_many_decades_are_powers_of_ten_and_stand_apart():
    rates = [1e-5, 1e-3, 0.1, 1.0]
    trials = [plots.Trials(name, plots.Style("ours-0"), rates, [0.4, 0.3, 0.2, 0.5], [], 0.1) for name in "AB"]
    figure = plots.tuning(trials)
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [label for label in axes.get_xticklabels() if axes.get_xlim()[0] < label.get_position()[0] < 2]
        assert [label.get_text() for label in labels] == ["10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "10⁰"]
        boxes = [label.get_window_extent() for label in labels]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
