"""Small modules that exercises hand over as arguments. They stand apart from the checkers, since a student's process,
which has to build them, must not hold a checker."""

import torch
from torch import nn


class Pair(nn.Module):
    """up_up holds the name of up, begins with it and ends in it: no wrong comparison of names leaves it alone."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.up_up = nn.Linear(2 * width, 2 * width)

    def forward(self, x):
        return self.down(self.up_up(self.up(x)).relu())


class Tuned(nn.Module):
    """Stands for a LoRA layer: it keeps its base, trains something of its own, and shows in the output."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.factor = base, nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.factor * self.base(x)


class Speaker(nn.Module):
    """A language model of two matrices, ids (B, T) -> logits (B, T, words): it looks at one token and guesses the next.
    The first matrix is frozen."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.table, self.head = nn.Linear(words, width, bias=False), nn.Linear(width, words)
        self.table.requires_grad_(False)

    def forward(self, ids):
        return self.head(self.table.weight.T[ids].tanh())


class Layer(nn.Module):
    """As minilora's LoRA layer is named."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(3, 3)
        self.lora_A, self.lora_B = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.zeros(3, 1))


class Residual:
    """x + tanh(W x + B A x), as a plain function of x, A and B."""

    def __init__(self, W: torch.Tensor):
        self.W = W

    def __call__(self, x, A, B):
        return x + torch.tanh(x @ self.W.T + x @ A.T @ B.T)
