"""Drawings of the layer itself: W + s B A, where it stands in a block, a step by hand, a matrix as arrows."""

import numpy as np
from matplotlib.figure import Figure

from ..sheet import INK, Sheet

Drawing = tuple[Figure, str]


def lora_layer(d_in: int = 1024, d_out: int = 1024, rank: int = 8) -> Drawing:
    """The frozen weight and, beside it, the two thin matrices."""
    sheet = Sheet(13, 7.4)
    sheet.box(0.3, 3.0, 1.5, 1.2, f"x\n({d_in:,})", "data")
    sheet.box(4.0, 4.3, 3.6, 2.6, f"W, frozen\n{d_out:,} x {d_in:,}\n= {d_out * d_in:,} numbers", "frozen")
    sheet.box(3.2, 1.4, 2.6, 0.8, f"A: {rank} x {d_in:,}, trains", "trains", 8)
    sheet.box(6.6, 0.6, 0.9, 2.4, f"B\n{d_out:,}\nx {rank}\n\ntrains", "trains", 8)
    sheet.box(11.2, 3.0, 1.5, 1.2, f"h\n({d_out:,})", "data")
    sheet.arrow((1.8, 3.8), (4.0, 5.4))
    sheet.arrow((1.8, 3.3), (3.2, 1.9))
    sheet.arrow((5.8, 1.8), (6.6, 1.8))
    sheet.words(6.2, 2.15, f"({rank})", 8)
    sheet.arrow((7.5, 1.8), (8.3, 1.8))
    sheet.box(8.3, 1.3, 1.6, 1.0, "times s\n= alpha / r", "quiet", 7)
    sheet.arrow((7.6, 5.4), (9.75, 3.85))
    sheet.arrow((9.6, 2.3), (10.0, 3.2))
    sheet.plus(10.0, 3.6)
    sheet.arrow((10.4, 3.6), (11.2, 3.6))
    thin = rank * (d_in + d_out)
    sheet.words(6.0, 0.2, f"A and B together: {thin:,} numbers, {thin / (d_in * d_out):.1%} of W's", bold=True)
    return sheet.fig, (f"The LoRA layer: x goes through the frozen W ({d_out:,} x {d_in:,}) and through A "
                       f"({rank} x {d_in:,}) and B ({d_out:,} x {rank}); the second path is scaled by s = "
                       f"alpha / r and "
                       f"added. A and B have {thin:,} numbers, W has {d_out * d_in:,}.")


def decoder_block() -> Drawing:
    """One block of a decoder, with every linear that an adapter can go beside."""
    sheet = Sheet(14, 8.6)
    sheet.box(0.3, 3.7, 1.3, 1.0, "x", "data")
    sheet.box(2.2, 3.7, 1.1, 1.0, "norm", "quiet", 8)
    sheet.arrow((1.6, 4.2), (2.2, 4.2))
    for name, y in (("q", 5.9), ("k", 3.7), ("v", 1.5)):
        sheet.box(4.0, y, 1.1, 1.0, name, "frozen", 11)
        sheet.box(4.0, y - 0.55, 1.1, 0.42, "B A", "trains", 7)
        sheet.arrow((3.3, 4.2), (4.0, y + 0.5))
        sheet.arrow((5.1, y + 0.5), (5.9, 4.2 + (y - 3.7) * 0.25))
    sheet.box(5.9, 3.3, 1.5, 1.8, "attention:\nwhere\nto look", "quiet", 8)
    sheet.box(8.0, 3.7, 1.0, 1.0, "o", "frozen", 11)
    sheet.box(8.0, 3.15, 1.0, 0.42, "B A", "trains", 7)
    sheet.arrow((7.4, 4.2), (8.0, 4.2))
    sheet.arrow((9.0, 4.2), (9.35, 4.2))
    sheet.plus(9.6, 4.2)
    sheet.line([(0.95, 4.7), (0.95, 7.9), (9.6, 7.9)])
    sheet.arrow((9.6, 7.9), (9.6, 4.6))
    sheet.box(10.2, 5.9, 1.2, 1.0, "gate", "frozen", 9)
    sheet.box(10.2, 5.35, 1.2, 0.42, "B A", "trains", 7)
    sheet.box(10.2, 1.5, 1.2, 1.0, "up", "frozen", 9)
    sheet.box(10.2, 0.95, 1.2, 0.42, "B A", "trains", 7)
    sheet.arrow((9.7, 4.5), (10.2, 6.3))
    sheet.arrow((9.7, 3.9), (10.2, 2.0))
    sheet.plus(11.9, 4.2, "x")
    sheet.arrow((11.4, 6.3), (11.85, 4.6))
    sheet.arrow((11.4, 2.0), (11.85, 3.8))
    sheet.box(12.5, 3.7, 1.2, 1.0, "down", "frozen", 9)
    sheet.box(12.5, 3.15, 1.2, 0.42, "B A", "trains", 7)
    sheet.arrow((12.2, 4.2), (12.5, 4.2))
    sheet.words(6.6, 0.35, "attention: q, k, v, o", bold=True)
    sheet.words(12.0, 0.35, "MLP: gate, up, down", bold=True)
    sheet.words(7.0, 8.25, "the residual: x is added to what attention says (the MLP has its own, not drawn)")
    return sheet.fig, ("One decoder block. Seven linears can have an adapter B A beside them: q, k, v and o in "
                       "attention, gate, up and down in the MLP. q and k decide where attention looks; v, o "
                       "and the MLP "
                       "carry what is said.")


def rank_one_step() -> Drawing:
    """A 2 x 3 weight, rank 1, one example: forward, the first step, the second, with numbers that fit in the head."""
    A, B, x, gradient, rate = np.array([[1.0, 0, 2]]), np.zeros((2, 1)), np.array([1.0, 1, 1]), np.array([1.0, -2]), 0.1
    sheet = Sheet(15, 8.6)
    for step, y in (("at the start", 7.8), ("after step 1", 4.9), ("after step 2", 2.0)):
        sheet.words(1.1, y - 0.7, step, bold=True)
        sheet.matrix(2.6, y, rounded(B), "trains", "B (2 x 1)")
        sheet.words(3.85, y - 0.8, "x", 12)
        sheet.matrix(4.4, y - 0.4, rounded(A), "trains", "A (1 x 3)")
        sheet.words(7.2, y - 0.8, "=", 12)
        sheet.matrix(7.7, y, rounded(B @ A), "quiet", "B A (2 x 3): added to W")
        dB, dA = np.outer(gradient, A @ x), B.T @ gradient[:, None] * x
        sheet.words(12.7, y - 0.35, f"gradient of B: {spelled(dB)}", 9)
        sheet.words(12.7, y - 1.05, f"gradient of A: {spelled(dA)}", 9)
        B, A = B - rate * dB, A - rate * dA
    return sheet.fig, ("One rank, by hand: x = (1, 1, 1), the gradient at the output stays (1, -2), the "
                       "learning rate is "
                       "0.1. At the start B is zero, so the gradient of A is zero and B alone moves. After step 1 B is "
                       "(-0.3, 0.6), so A moves too.")


def rounded(M: np.ndarray) -> list[list[str]]:
    return [[f"{v + 0:.3g}" for v in np.round(row, 2)] for row in M]


def spelled(M: np.ndarray) -> str:
    return "(" + ", ".join(f"{v + 0:.3g}" for v in np.round(M, 2).flatten()) + ")"


def svd_arrows() -> Drawing:
    """A matrix takes the unit circle to an ellipse: the singular vectors are its axes, the singular values their
    lengths."""
    M = np.array([[1.3, 0.7], [0.4, 1.1]])
    U, S, Vh = np.linalg.svd(M)
    U, Vh = U * np.sign(Vh[:, 0]), Vh * np.sign(Vh[:, :1])  # the signs are free: v1 and v2 point to the right
    sheet = Sheet(14, 6.4)
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    best = S[0] * np.outer(U[:, 0], Vh[0])
    for x, through, title in ((2.2, np.eye(2), "inputs of length 1"), (7.0, M, "what the matrix makes of them"),
                              (11.4, best, "what rank 1 keeps of it")):
        sheet.axes.plot(*(through @ circle + [[x], [2.9]]), color=INK, linewidth=1.0)
        sheet.words(x, 5.9, title, bold=True)
        for k, color in ((0, "#c8425a"), (1, "#2f7fc0")):
            tip = through @ Vh[k]
            if np.hypot(*tip) > 1e-6:
                sheet.arrow((x, 2.9), (x + tip[0], 2.9 + tip[1]), color=color)
                name = f"v{k + 1}" if x < 3 else f"{S[k]:.2f} u{k + 1}"
                past = tip * (1 + 0.25 / np.hypot(*tip))  # a quarter of a unit beyond the arrow's tip
                sheet.words(x + past[0], 2.9 + past[1], name, ha="left")
    sheet.arrow((4.0, 2.9), (4.8, 2.9))
    sheet.arrow((9.4, 2.9), (10.0, 2.9), dashed=True)
    sheet.words(7.0, 0.3, "at right angles before and after; the lengths are the singular values")
    return sheet.fig, (f"The SVD as arrows: the matrix turns v1 into {S[0]:.2f} u1 and v2 into {S[1]:.2f} u2, "
                       f"both pairs "
                       f"at right angles. The best matrix of rank 1 keeps the longer arrow and loses the shorter one, "
                       f"which is {S[1] / np.hypot(*S):.2f} of the matrix's length.")
