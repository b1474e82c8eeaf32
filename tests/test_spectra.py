"""What the sweep of spectra computes of its runs: updates, cuts, pooled spectra, shared directions."""

import copy

import pytest
import small
import torch

from minilora import LoRAConfig, inject, merge
from minilora.experiments import pooled, rebuilt, shared_directions, updates
from minilora.spectrum import energy, extract_lora


@pytest.fixture
def tuned():
    """A base, and a copy of it in which every parameter moved."""
    torch.manual_seed(0)
    base = small.our_llama()
    model = copy.deepcopy(base)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return base, model


def test_updates_are_what_a_merge_would_add_and_rebuilt_puts_them_back(tuned):
    base, model = tuned
    deltas = updates(model, base)
    assert all(".layers." in name for name in deltas) and len(deltas) == 7 * len(base.model.layers)
    ids = torch.arange(12).view(2, 6)
    again = rebuilt(model, base, deltas)
    assert (again(ids) - model(ids)).abs().max() < 1e-4
    bare = rebuilt(model, base, {name: torch.zeros_like(d) for name, d in deltas.items()})
    assert torch.equal(bare.get_submodule(next(iter(deltas))).weight, base.get_submodule(next(iter(deltas))).weight)
    assert torch.equal(bare.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert (model(ids) - bare(ids)).abs().max() > 1e-2  # and the model itself was left alone

    lora = inject(copy.deepcopy(base), LoRAConfig(2, 6, ("q_proj", "up_proj")))
    small.shake(lora)
    of_lora = updates(lora, base)
    merge(lora, permanent=True)
    for name, delta in updates(lora, base).items():
        assert (delta - of_lora[name]).abs().max() < 1e-5
        assert delta.any() == name.endswith(("q_proj", "up_proj"))


def test_the_pooled_energy_is_what_cutting_each_matrix_keeps():
    torch.manual_seed(0)
    deltas = [scale * torch.randn(*shape) for scale, shape in ((1, (6, 9)), (5, (9, 6)), (0.2, (6, 6)))]
    whole = sum(d.square().sum() for d in deltas)
    for rank, share in enumerate(energy(pooled(deltas)).tolist(), 1):
        cuts = [extract_lora(d, rank=rank) for d in deltas]
        kept = sum((cut.B @ cut.A).square().sum() for cut in cuts) / whole
        assert abs(share - kept) < 1e-5


def test_shared_directions_tell_the_input_from_the_output():
    torch.manual_seed(0)
    U, V, other = (torch.linalg.qr(torch.randn(40, 6)).Q for _ in range(3))
    S = torch.arange(6, 0, -1.0)
    one, same_input = U * S @ V.T, other * S @ V.T
    assert torch.allclose(shared_directions(one, same_input, "input", 6), torch.ones(6), atol=1e-4)
    assert shared_directions(one, same_input, "output", 6).max() < 0.6
    assert torch.allclose(shared_directions(one, one, "output", 6), torch.ones(6), atol=1e-4)
