"""Drawings of methods: blocks and their constants, a mixed batch, the relatives in one block."""

from matplotlib.figure import Figure

from ..sheet import Sheet

Drawing = tuple[Figure, str]


def quantised_blocks() -> Drawing:
    """Weights in blocks, an absmax for each, and the absmax in blocks of their own."""
    sheet = Sheet(15, 8.0)
    weights = ([0.5, -1.0, 0.25, 0.75], [0.1, 0.2, -0.05, 0.15], [-3.0, 1.5, 0.0, 2.25])
    sheet.words(1.2, 6.6, "weights,\nin blocks", bold=True)
    sheet.words(1.2, 4.8, "absmax\nof each", bold=True)
    sheet.words(1.2, 3.0, "divided by\nthe absmax", bold=True)
    sheet.words(1.2, 1.3, "constants\nin blocks too", bold=True)
    for n, block in enumerate(weights):
        x, top = 2.6 + 4.1 * n, max(map(abs, block))
        for i, w in enumerate(block):
            sheet.box(x + 0.95 * i, 6.2, 0.88, 0.8, f"{w:g}", "frozen", 8)
            sheet.box(x + 0.95 * i, 2.6, 0.88, 0.8, f"{w / top:.2g}", "quiet", 8)
        sheet.arrow((x + 1.9, 6.2), (x + 1.9, 5.25))
        sheet.box(x + 1.2, 4.4, 1.4, 0.8, f"{top:g}", "held", 9)
        sheet.arrow((x + 1.9, 4.4), (x + 1.9, 3.45))
        sheet.words(x + 1.9, 2.3, "each becomes a code of 4 bits", 7)
        sheet.box(x + 1.2, 0.9, 1.4, 0.8, "8 bits", "held", 8)
    sheet.words(8.5, 0.4, "double quantisation: many absmax, 8 bits each, share one scale of 32 bits")
    return sheet.fig, ("Blocks and their constants: every block of weights is divided by its own largest "
                       "magnitude, its "
                       "absmax, so that all lie between -1 and 1 and a code of 4 bits names the nearest level. An "
                       "outlier spoils its own block alone. Double quantisation stores the absmax in 8 bits, with one "
                       "scale of 32 bits for many of them.")


def mixed_batch() -> Drawing:
    """Rows of one batch, each through the base and through the adapter of its own customer."""
    sheet = Sheet(14, 8.0)
    sheet.words(6.0, 7.6, "one frozen W: one product for all rows", bold=True)
    for name, y in (("acme", 6.0), ("zen", 4.3), (None, 2.6), ("acme", 0.9)):
        sheet.box(0.4, y, 2.6, 0.9, f"row: {name or 'no adapter'}", "data", 8)
        sheet.box(4.6, y + 0.5, 2.8, 0.6, "W", "frozen", 8)
        sheet.arrow((3.0, y + 0.55), (4.6, y + 0.8))
        sheet.arrow((7.4, y + 0.8), (8.9, y + 0.6))
        if name:
            sheet.box(4.6, y - 0.35, 2.8, 0.6, f"A, B of {name}", "trains", 8)
            sheet.arrow((3.0, y + 0.35), (4.6, y - 0.05), dashed=True)
            sheet.arrow((7.4, y - 0.05), (8.9, y + 0.35), dashed=True)
            sheet.plus(9.2, y + 0.47)
            sheet.arrow((9.5, y + 0.47), (10.8, y + 0.47))
        else:
            sheet.arrow((8.9, y + 0.6), (10.8, y + 0.5))
        sheet.box(10.8, y, 2.6, 0.9, "W x + s B A x" if name else "W x", "data", 8)
    return sheet.fig, ("A mixed batch: all rows go through the frozen W in one product. Rows of acme also go through "
                       "acme's A and B, the row of zen through zen's, and the row without an adapter through W alone.")


def relatives() -> Drawing:
    """Where each method of the family stands in one block."""
    sheet = Sheet(15, 7.6)
    sheet.box(0.3, 5.6, 1.9, 0.9, "prompt tokens", "trains", 8)
    sheet.box(0.3, 3.4, 1.9, 1.0, "the text", "data")
    sheet.arrow((1.25, 5.6), (1.25, 4.4))
    sheet.arrow((2.2, 3.9), (3.2, 3.9))
    sheet.box(3.2, 2.9, 3.4, 2.0, "attention\nq  k  v  o", "frozen", 10)
    sheet.box(3.2, 5.6, 1.6, 0.9, "prefix:\nkeys, values", "trains", 7)
    sheet.arrow((4.0, 5.6), (4.3, 4.9))
    sheet.box(5.0, 5.6, 1.6, 0.9, "LoRA: B A\nbeside W", "trains", 7)
    sheet.arrow((5.8, 5.6), (5.5, 4.9))
    sheet.box(3.2, 1.1, 1.6, 0.9, "(IA)3: factors\non k and v", "trains", 7)
    sheet.arrow((4.0, 2.0), (4.3, 2.9))
    sheet.box(5.0, 1.1, 1.6, 0.9, "BitFit:\nbiases", "trains", 7)
    sheet.arrow((5.8, 2.0), (5.5, 2.9))
    sheet.box(7.3, 3.4, 1.6, 1.0, "adapter\n(gelu inside)", "trains", 7)
    sheet.arrow((6.6, 3.9), (7.3, 3.9))
    sheet.arrow((8.9, 3.9), (9.6, 3.9))
    sheet.box(9.6, 2.9, 2.2, 2.0, "MLP", "frozen", 11)
    sheet.box(9.0, 5.6, 1.5, 0.9, "LoRA", "trains", 8)
    sheet.arrow((9.8, 5.6), (10.3, 4.9))
    sheet.box(10.9, 5.6, 1.5, 0.9, "(IA)3:\nfactors", "trains", 7)
    sheet.arrow((11.6, 5.6), (11.1, 4.9))
    sheet.box(12.5, 3.4, 1.6, 1.0, "adapter", "trains", 8)
    sheet.arrow((11.8, 3.9), (12.5, 3.9))
    sheet.arrow((14.1, 3.9), (14.8, 3.9))
    sheet.words(7.5, 0.4, "folded away afterwards: LoRA, (IA)3, and BitFit where the base has biases; the others stay")
    return sheet.fig, ("The family in one block. Prompt tokens stand before the text; a prefix adds keys and values to "
                       "attention; LoRA stands beside a weight; (IA)3 scales keys, values and the MLP's inside; BitFit "
                       "moves biases; a bottleneck adapter stands behind attention and behind the MLP. LoRA and "
                       "(IA)3 can be folded into the weights, BitFit into the biases that a base has; the others "
                       "cannot.")
