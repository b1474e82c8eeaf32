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


def parts_of(q, k, v, prefix_k, prefix_v):
    """Keys, values and scores, as they should be."""
    keys = torch.cat([prefix_k, k], dim=0)
    return keys, torch.cat([prefix_v, v], dim=0), q @ keys.T / q.shape[-1] ** 0.5


def sees_all(q, k, v, prefix_k, prefix_v):
    keys, values, scores = parts_of(q, k, v, prefix_k, prefix_v)
    return F.softmax(scores, dim=-1) @ values


def is_causal_from_the_first_column(q, k, v, prefix_k, prefix_v):
    keys, values, _ = parts_of(q, k, v, prefix_k, prefix_v)
    return F.scaled_dot_product_attention(q[None], keys[None], values[None], is_causal=True)[0]


def masks_itself(q, k, v, prefix_k, prefix_v):
    keys, values, scores = parts_of(q, k, v, prefix_k, prefix_v)
    for t in range(len(q)):
        scores[t, len(prefix_k) + t:] = float("-inf")
    return scores.softmax(-1) @ values


def peeks(q, k, v, prefix_k, prefix_v):
    keys, values, scores = parts_of(q, k, v, prefix_k, prefix_v)
    for t in range(len(q)):
        scores[t, len(prefix_k) + t + 2:] = float("-inf")
    return scores.softmax(-1) @ values


def not_scaled(q, k, v, prefix_k, prefix_v):
    mask = torch.ones(len(q), len(prefix_k) + len(k), dtype=torch.bool).tril(len(prefix_k))
    keys, values, _ = parts_of(q, k, v, prefix_k, prefix_v)
    return F.scaled_dot_product_attention(q[None], keys[None], values[None], attn_mask=mask, scale=1.0)[0]


def keys_as_values(q, k, v, prefix_k, prefix_v):
    mask = torch.ones(len(q), len(prefix_k) + len(k), dtype=torch.bool).tril(len(prefix_k))
    keys, values, _ = parts_of(q, k, v, prefix_k, prefix_k)
    values[len(prefix_k):] = v
    return F.scaled_dot_product_attention(q[None], keys[None], values[None], attn_mask=mask)[0]


def prefix_ignored(q, k, v, prefix_k, prefix_v):
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def prefix_behind(q, k, v, prefix_k, prefix_v):
    keys, values = torch.cat([k, prefix_k]), torch.cat([v, prefix_v])
    later = torch.triu(torch.ones(len(q), len(keys)), diagonal=len(prefix_k) + 1) == 1
    scores = (q @ keys.T / len(q[0]) ** 0.5).masked_fill(later, -1e9)
    return scores.softmax(-1) @ values


def asks_too(q, k, v, prefix_k, prefix_v):
    q, k, v = torch.cat([prefix_k, q]), torch.cat([prefix_k, k]), torch.cat([prefix_v, v])
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def masked_after_the_softmax(q, k, v, prefix_k, prefix_v):
    keys, values, scores = parts_of(q, k, v, prefix_k, prefix_v)
    return scores.softmax(-1).tril(len(prefix_k)) @ values


WRONG = {
    "prepend": [
        (after, "comes after the text"), (no_batch, "no batch dimension"), (first_row, "only the first row"),
        (replaced, "taken the place"), (prompt_alone, "the text is gone")],
    "attend_with_prefix": [
        (sees_all, "no causal mask"), (is_causal_from_the_first_column, "n columns farther"),
        (masks_itself, "looks at itself as well"), (peeks, "must not look at the next"),
        (not_scaled, "not divided by the root"), (keys_as_values, "its values belong there"),
        (prefix_ignored, "the prefix is missing"), (prefix_behind, "stands after the text's keys"),
        (asks_too, "n rows too many"), (masked_after_the_softmax, "after the softmax")],
    "bottleneck": [
        (no_skip, "no skip"), (linear, "one matrix of low rank"), (with_relu, "that is relu"),
        (outside, "inside the bottleneck, before up"), (last, "added at the very end")],
    "fold": [
        (columns, "scale the rows"), (rows, "scale the columns"), (mixed_up, "mixed up"), (on_top, "not W plus it"),
        (divided, "divided by")],
}
