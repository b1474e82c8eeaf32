"""Wrong answers to the exercises of notebook 12, as learners may write them, and a part of what each must be told."""

import torch
import torch.nn.functional as F


def after(prompt, text):
    return torch.cat([text, prompt.expand(text.shape[0], *prompt.shape)], dim=1)


def no_batch(prompt, text):
    return torch.cat([prompt, text], dim=1)


def first_row(prompt, text):
    return torch.cat([prompt.unsqueeze(0), text[0].unsqueeze(0)], dim=1)


def replaced(prompt, text):
    text = text.clone()
    text[:, :prompt.shape[0], :] = prompt
    return text


def prompt_alone(prompt, text):
    return prompt.unsqueeze(0).expand(text.shape[0], -1, -1)


def no_skip(h, down, up):
    return F.linear(F.gelu(F.linear(h, down)), up)


def linear(h, down, up):
    return h + F.linear(F.linear(h, down), up)


def with_relu(h, down, up):
    return h + torch.relu(h @ down.mT) @ up.mT


def outside(h, down, up):
    return h + F.gelu(F.linear(F.linear(h, down), up))


def last(h, down, up):
    return F.gelu(h + F.linear(F.linear(h, down), up))


def columns(W, scale, at_input):
    return W * scale[None, :]


def rows(W, scale, at_input):
    return torch.einsum("o,oi->oi", scale, W)


def mixed_up(W, scale, at_input):
    return torch.diag(scale) @ W if at_input else W @ torch.diag(scale)


def on_top(W, scale, at_input):
    return W + (W * scale if at_input else W * scale.unsqueeze(1))


def divided(W, scale, at_input):
    return W / scale if at_input else W / scale.unsqueeze(1)


WRONG = {
    "prepend": [
        (after, "comes after the text"), (no_batch, "no batch dimension"), (first_row, "only the first row"),
        (replaced, "taken the place"), (prompt_alone, "the text is gone")],
    "bottleneck": [
        (no_skip, "no skip"), (linear, "one matrix of low rank"), (with_relu, "that is relu"),
        (outside, "inside the bottleneck, before up"), (last, "added at the very end")],
    "fold": [
        (columns, "scale the rows"), (rows, "scale the columns"), (mixed_up, "mixed up"), (on_top, "not W plus it"),
        (divided, "divided by")],
}
