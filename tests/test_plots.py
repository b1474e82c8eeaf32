"""Figures: what is drawn is what was given."""

import importlib

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from minilora import plots
from minilora.plots import diagrams
from minilora.plots.sheet import INK, KINDS


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


# ---------------------------------------------------------------- drawings


@pytest.mark.parametrize("name", diagrams.__all__)
def test_every_drawing_stands_within_its_sheet_and_says_what_it_shows(name):
    """No word is cut off, in a picture as wide as a page; the page shows through."""
    fig, sentence = getattr(diagrams, name)()
    FigureCanvasAgg(fig).draw()
    page = fig.bbox
    outside = [t.get_text() for t in fig.axes[0].texts for box in [t.get_window_extent()]
               if box.x0 < page.x0 - 1 or box.x1 > page.x1 + 1 or box.y0 < page.y0 - 1 or box.y1 > page.y1 + 1]
    assert outside == [] and 40 < len(sentence) < 600 and fig.get_figwidth() <= 8
    assert fig.patch.get_alpha() == 0


def contrast(one, other):
    """The contrast ratio of the WCAG, from 1 to 21."""
    def light(color):
        channels = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), channels))
    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_word_of_a_drawing_reads_on_light_and_dark_pages():
    assert all(contrast(fill, ink) >= 4.5 for fill, ink, _, _ in KINDS.values())
    assert min(contrast(INK, page) for page in ("#ffffff", "#111111")) >= 4


def test_numbers_of_the_drawings_are_those_of_torch():
    import torch

    A, B = torch.tensor([[1.0, 0, 2]], requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    for _ in range(2):
        (torch.tensor([1.0, -2]) * (B @ A @ torch.ones(3))).sum().backward()
        for M in (A, B):
            M.data -= 0.1 * M.grad
            M.grad = None
    shown = [t.get_text() for t in diagrams.rank_one_step()[0].axes[0].texts]
    wanted = [f"{v:.3g}" for v in (B @ A).detach().numpy().round(2).flatten()]
    assert all(number in shown for number in wanted)
