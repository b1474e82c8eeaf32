"""Figures: what is drawn is what was given."""

from matplotlib.backends.backend_agg import FigureCanvasAgg

from minilora import plots


def drawn(**settings):
    fig = plots.lines([1, 4, 16], {"a": [0.02, 0.3, 6.0]}, title="", xlabel="", ylabel="", **settings)
    FigureCanvasAgg(fig).draw()
    return fig.axes[0]


def test_a_band_reaches_from_the_least_to_the_most():
    axes = drawn(bands={"a": ([0.01, 0.2, 5.0], [0.04, 0.4, 7.0])})
    (band,) = axes.collections
    assert [float(f"{v:.6g}") for v in band.get_paths()[0].get_extents().bounds] == [1, 0.01, 15, 6.99]
    assert not drawn().collections


def test_a_logarithmic_axis_bears_plain_numbers():
    labels = {t.get_text() for t in drawn(logy=True).yaxis.get_ticklabels(which="both")}
    assert {"0.1", "1"} <= labels and not any("10^" in label for label in labels)
