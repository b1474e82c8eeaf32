"""Notebook 12: virtual tokens, a prefix in attention, a bottleneck, factors folded into a weight; predictions about
latency and about size."""

import torch
import torch.nn.functional as F

from . import Exercise, Prediction

# ---------------------------------------------------------------- prepend


def prompt_and_text(seed: int) -> tuple:
    n, batch, tokens, width = 3 + seed, (2, 1, 4, 3)[seed % 4], 8 + 2 * seed, 6 + seed
    return torch.randn(n, width), torch.randn(batch, tokens, width)


def before(prompt, text):
    out = text.new_empty(text.shape[0], len(prompt) + text.shape[1], text.shape[2])
    for row in range(len(text)):
        out[row, :len(prompt)], out[row, len(prompt):] = prompt, text[row]
    return out


def repeated(prompt, text):
    return prompt[None].repeat(len(text), 1, 1)


def over(prompt, text):
    out = text.clone()
    out[:, :len(prompt)] = prompt
    return out


prepend = Exercise(
    "prepend", before, prompt_and_text,
    [(lambda prompt, text: torch.cat((text, repeated(prompt, text)), 1),
      "the prompt comes after the text: it must stand before, or no word of the text can look back at it"),
     (over, "the prompt has taken the place of the first words: put it before them"),
     (lambda prompt, text: torch.cat((prompt, text[0])), "one text only: every row of the batch gets the prompt"),
     (lambda prompt, text: torch.cat((prompt[None], text[:1]), 1),
      "only the first row is left: every row of the batch gets the prompt (expand it to the batch)"),
     (repeated, "the text is gone: join the prompt and the text"),
     (lambda prompt, text: torch.cat((prompt, text), 1),
      "the prompt has no batch dimension yet: expand it to (B, n, C) before you join"),
     (lambda prompt, text: torch.cat((repeated(prompt, text), text), 2),
      "the prompt is joined along the width: tokens stand along dimension 1"),
     (lambda prompt, text: torch.cat((repeated(prompt, text), text), 0),
      "the prompt is joined along the batch: tokens stand along dimension 1"),
     (lambda prompt, text: torch.cat((repeated(prompt, text).flip(1), text), 1),
      "the prompt's tokens stand in the reverse order"),
     (lambda prompt, text: torch.cat((prompt.mean(0).expand(len(text), len(prompt), -1), text), 1),
      "every virtual token is the mean of them: put them in as they are"),
     (lambda prompt, text: torch.cat((prompt[:1].expand(len(text), len(prompt), -1), text), 1),
      "the first virtual token is repeated: all n of them stand before the text"),
     (lambda prompt, text: torch.cat((repeated(prompt, text), text, repeated(prompt, text)), 1),
      "the prompt stands before and after the text: before it alone"),
     (lambda prompt, text: torch.cat((repeated(prompt, text)[:, :1], text), 1),
      "one virtual token alone is put in: all n of them belong there")],
    situations=[(lambda prompt, text: len(text) == 1, "the batch has one text"),
                (lambda prompt, text: len(text) > 1, "the batch has several texts")])

# ---------------------------------------------------------------- attend_with_prefix


def head_and_prefix(seed: int) -> tuple:
    tokens, width, n = (4, 6, 5, 1)[seed % 4], (5, 4, 7, 6)[seed % 4], (2, 3, 1, 4)[seed % 4]
    q, k, v = torch.randn(3, tokens, width).unbind()
    return q, k, v, *torch.randn(2, n, width).unbind()


def attended(q, k, v, prefix_k, prefix_v):
    """Token by token: what it may look at, and the mean of their values."""
    rows = []
    for t in range(len(q)):
        keys, values = torch.cat((prefix_k, k[:t + 1])), torch.cat((prefix_v, v[:t + 1]))
        share = (keys @ q[t] / q.shape[1] ** 0.5).exp()
        rows.append(share @ values / share.sum())
    return torch.stack(rows)


def attention(scale=lambda d: d**0.5, after=False, hide=None, mix_up=False, dim=-1):
    """The attention with one thing changed."""
    def attend(q, k, v, prefix_k, prefix_v):
        n, T = len(prefix_k), len(q)
        keys, values = (torch.cat(pair[::-1] if after else pair) for pair in ((prefix_k, k), (prefix_v, v)))
        if mix_up:
            values = torch.cat((prefix_k, v))
        hidden = torch.ones(T, n + T).triu(n + 1).bool() if hide is None else hide(T, n)
        scores = (q @ keys.T / scale(q.shape[1])).masked_fill(hidden, float("-inf"))
        return scores.softmax(dim) @ values
    return attend


attend_with_prefix = Exercise(
    "attend_with_prefix", attended, head_and_prefix,
    [(attention(hide=lambda T, n: torch.zeros(T, n + T).bool()),
      "no causal mask: a token must not look at the text's tokens that come after it"),
     (attention(hide=lambda T, n: torch.ones(T, n + T).triu(1).bool()),
      "the prefix is masked as if it were text that comes later: column j is token j - n, so the mask starts n columns "
      "farther to the right"),
     (attention(hide=lambda T, n: torch.ones(T, n + T).triu(n).bool()),
      "one too few is seen: a token looks at itself as well"),
     (attention(hide=lambda T, n: torch.ones(T, n + T).triu(n + 2).bool()),
      "one too many is seen: a token must not look at the next one"),
     (attention(scale=lambda d: 1), "the scores are not divided by the root of the width, q.shape[-1] ** 0.5"),
     (attention(scale=lambda d: d), "divided by the width: by its root"),
     (attention(scale=lambda d: d**-0.5), "multiplied by the root of the width: divide by it"),
     (attention(mix_up=True), "the prefix's keys stand among the values: its values belong there"),
     (lambda q, k, v, prefix_k, prefix_v: (q @ torch.cat((prefix_k, k)).T / q.shape[1]**0.5).softmax(-1)
      .tril(len(prefix_k)) @ torch.cat((prefix_v, v)),
      "masked after the softmax, so that the shares no longer add up to 1: put minus infinity in before it"),
     (attention(dim=0), "the softmax runs over the queries: it belongs over the keys, the last dimension"),
     (lambda q, k, v, prefix_k, prefix_v: attention()(q, k, v, prefix_k[:0], prefix_v[:0]),
      "the prefix is missing: its keys and values stand before those of the text"),
     (attention(after=True), "the prefix stands after the text's keys: the mask then hides the wrong places"),
     (lambda q, k, v, prefix_k, prefix_v: attended(q, k, v, prefix_k, prefix_v)
      + attended(q, k, v, prefix_k[:0], prefix_v[:0]),
      "two attentions are added: there is one softmax, over prefix and text together"),
     (lambda q, k, v, prefix_k, prefix_v:
      attention()(torch.cat((prefix_k, q)), torch.cat((prefix_k, k)), torch.cat((prefix_v, v)), k[:0], v[:0]),
      "there are n rows too many: the prefix has keys and values, and asks nothing itself")],
    tolerance=1e-4, situations=[(lambda q, *rest: len(q) == 1, "the text is a single token"),
                                (lambda q, *rest: len(q) > 1, "the text has several tokens")])

# ---------------------------------------------------------------- bottleneck


def hidden_and_factors(seed: int) -> tuple:
    width, inner = 6 + seed, 2 + seed
    return torch.randn(2, 3 + seed, width), torch.randn(inner, width), torch.randn(width, inner)


def squeezed(h, down, up):
    inside = F.gelu(torch.einsum("btc,mc->btm", h, down))
    return h + torch.einsum("btm,cm->btc", inside, up)


bottleneck = Exercise(
    "bottleneck", squeezed, hidden_and_factors,
    [(lambda h, down, up: F.gelu(h @ down.T) @ up.T, "no skip: without h + ... the frozen layer's output is lost"),
     (lambda h, down, up: h + h @ down.T @ up.T,
      "without the gelu between them down and up are one matrix of low rank: that is a LoRA, and could be merged"),
     (lambda h, down, up: h + F.relu(h @ down.T) @ up.T, "that is relu: the nonlinearity asked for is gelu"),
     (lambda h, down, up: h + F.gelu(h @ down.T @ up.T), "the gelu belongs inside the bottleneck, before up"),
     (lambda h, down, up: F.gelu(h + h @ down.T @ up.T),
      "the gelu belongs inside the bottleneck, and h is added at the very end"),
     (lambda h, down, up: h + F.gelu(F.gelu(h @ down.T) @ up.T), "one gelu, between down and up: none after up"),
     (lambda h, down, up: h + F.gelu(h @ down.T, approximate="tanh") @ up.T,
      "that is gelu's tanh approximation: F.gelu(x) as it stands is the exact one"),
     (lambda h, down, up: h + F.silu(h @ down.T) @ up.T, "that is silu: the nonlinearity asked for is gelu"),
     (lambda h, down, up: h + torch.tanh(h @ down.T) @ up.T, "that is tanh: the nonlinearity asked for is gelu"),
     (lambda h, down, up: h - F.gelu(h @ down.T) @ up.T, "the bottleneck's output is added, not taken away"),
     (lambda h, down, up: F.gelu(h) + F.gelu(h @ down.T) @ up.T, "h is added as it is, without a gelu"),
     (lambda h, down, up: 2 * h + F.gelu(h @ down.T) @ up.T, "h is added twice"),
     (lambda h, down, up: h + (h @ down.T).sigmoid() @ up.T, "that is a sigmoid: the nonlinearity asked for is gelu"),
     (lambda h, down, up: h * (F.gelu(h @ down.T) @ up.T), "the bottleneck's output is added to h, not multiplied"),
     (lambda h, down, up: h + F.gelu(F.gelu(h) @ down.T) @ up.T, "one gelu, after down: none before it")])

# ---------------------------------------------------------------- fold


def weight_and_factors(seed: int) -> tuple:
    size = 5 + seed  # square, so that no shape gives the answer away
    return torch.randn(size, size), torch.rand(size) + 0.5, seed % 4 in (1, 2)


def folded(W, scale, at_input):
    return W @ torch.diag(scale) if at_input else torch.diag(scale) @ W


fold = Exercise(
    "fold", folded, weight_and_factors,
    [(lambda W, scale, at_input: folded(W, 1 / scale, at_input),
      "divided by the factors: (W x) times scale is (scale W) x"),
     (lambda W, scale, at_input: W * scale, "the factors on an output scale the rows of W: scale[:, None] * W"),
     (lambda W, scale, at_input: scale[:, None] * W, "the factors on an input scale the columns of W: W * scale"),
     (lambda W, scale, at_input: scale[:, None] * W if at_input else W * scale,
      "rows and columns are mixed up: an input's factor scales a column, an output's a row"),
     (lambda W, scale, at_input: W + folded(W, scale, at_input),
      "(IA)3 multiplies and adds nothing: return the scaled W, not W plus it"),
     (lambda W, scale, at_input: W * scale.mean(), "one factor for all: each input or output has its own"),
     (lambda W, scale, at_input: folded(W, scale, at_input).T, "the result is transposed: it is (d_out, d_in) as W is"),
     (lambda W, scale, at_input: folded(W, scale**2, at_input), "the factors count once"),
     (lambda W, scale, at_input: scale[:, None] * W * scale, "rows and columns are both scaled: one of them is, as "
                                                             "at_input says"),
     (lambda W, scale, at_input: W + (scale if at_input else scale[:, None]), "(IA)3 multiplies: it adds nothing"),
     (lambda W, scale, at_input: W @ scale if at_input else scale @ W,
      "this is a product with the vector, which adds up: scale every column or row and keep the matrix"),
     (lambda W, scale, at_input: torch.diag(torch.diag(folded(W, scale, at_input))),
      "only the diagonal is left: all of W is scaled"),
     (lambda W, scale, at_input: W.mul_(scale) if at_input else W.mul_(scale[:, None]),
      "this changes W in place: it is the base's")],
    situations=[(lambda W, scale, at_input: at_input, "at_input is True"),
                (lambda W, scale, at_input: not at_input, "at_input is False")])

# ---------------------------------------------------------------- predictions

still_costs = Prediction("c", {
    "a": "Not everything that was trained has to stay apart: a sum of matrices and a scaled matrix are plain weights "
         "again once they are worked out.",
    "b": "A product of two matrices can be worked out beforehand, a gelu cannot: it depends on what comes in. And a "
         "token that stands before the text has to be attended to by every token that follows.",
    "c": "W + sBA is one matrix, and so is W with its rows scaled. A bottleneck has a gelu inside, and virtual tokens "
         "have to be there to be seen. A change of a bias is a bias, and a Llama has none to add it to: it stays.",
    "d": "LoRA has the most, and after merging not one operation more than the base: the count says so.",
})

best_for_its_size = Prediction("b", {
    "a": "A prefix is no text. It was not written but found by gradient descent, from random words, and of the three "
         "it gets the fewest facts across.",
    "b": "LoRA is first by a clear margin, the bottleneck second. The count does not say why; where they stand "
         "differs: LoRA in every linear, the bottleneck only behind attention and behind the MLP, the prefix before "
         "the text.",
    "c": "At one size they lie far apart on this task. On the near task, where there is only a choice to be made, you "
         "would have been nearly right.",
})
