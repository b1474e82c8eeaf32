"""Figures: what is drawn is what was given."""

import importlib

import matplotlib
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


def test_each_method_stands_at_its_size_and_the_sentence_begins_with_the_best():
    sizes = {"LoRA": 1000, "prompt": 100}
    quality = {"near": {"LoRA": 90, "prompt": 95.5}, "far": {"LoRA": 60, "prompt": 9}}
    fig, sentence = plots.tradeoff(sizes, quality, {"LoRA": "1.0", "prompt": "1.1"}, title="t", ylabel="y")
    FigureCanvasAgg(fig).draw()
    for axes, values in zip(fig.axes, quality.values()):
        at = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in axes.lines}
        assert at == {"LoRA: 1.0": (1000, values["LoRA"]), "prompt: 1.1": (100, values["prompt"])}
        assert axes.get_xscale() == "log"
    assert sentence == "near, from the best: prompt: 95.5; LoRA: 90.0. far, from the best: LoRA: 60.0; prompt: 9.0."


def test_the_symptom_grid_says_whether_its_rows_can_be_told_apart():
    cells = {"well": {"loss": ("0.1", False), "exact": ("99%", False)},
             "ill": {"loss": ("0.1", False), "exact": ("2%", True)}}
    fig, sentence = plots.symptom_grid(cells, title="t")
    assert "well: 0 of 2; ill: 1 of 2" in sentence and sentence.endswith("other cells: True.")
    assert [t.get_text() for t in fig.axes[0].texts] == ["0.1", "99%", "0.1", "2%"]
    assert plots.symptom_grid({**cells, "also": cells["ill"]}, title="t")[1].endswith("other cells: False.")


def test_matplotlibs_own_settings_stay():
    before = dict(matplotlib.rcParams)
    fresh = importlib.reload(plots)
    fig = fresh.bars(["a", "b"], {"x": [1, 2]}, title="t", ylabel="y")
    assert dict(matplotlib.rcParams) == before
    assert not before["axes.grid"] and not fig.axes[0].spines["top"].get_visible()  # the figure has our style
