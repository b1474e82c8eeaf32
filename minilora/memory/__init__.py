"""What a fine-tune needs: derived from the shapes (`estimate`), searched (`fit`), traced (`trace`), all to the byte.

The walk of an estimate, `estimate(ModelSpec.preset("llama-3-8b"), Training(method="qlora"))`:

1. `run.Training` checks what is asked, against the registries `optimizers.OPTIMIZERS` and `stacks.STACKS`.
2. `models.ModelSpec` is the shape: read from a config.json, or from `presets`, by the model's `Family`. Families are
   the files of `decoders/`; each is read when a model of it is first asked for.
3. `simulate` plays the step on a ledger: the decoder of that family (`decoders/`, with `linears` and `activations`)
   makes its weights and its forward, `losses` ends it, `ledger` runs the graph back, the optimizer's entry plays its
   step. `ledger` notes when each storage is born and dies; `picking` and `ops` have torch's operators on it, `fsdp`
   what other cards' shares add.
4. `bill` plays four layers and five (a turn more, where kinds of layers take turns), follows the line through the two
   to the real number, finds the moment at which most is held, and adds up what is held then by part and name. `costs`
   adds what moves.
5. `fitting` puts a bill beside `cards`; `claims` puts it beside what papers say, `published` beside what cards held.

The second instrument is apart from this: `traced_models` makes a real model, `traced_step` a step of it with its
optimizer, `tracer` follows every storage of one real step on fake tensors, with CUDA's kernels (`cuda`) in the CPU's
place, and TRL's loss (`traced_losses`). The two must agree to the byte. `traced_bill` answers with it for architectures
that have no closed form.

Who imports whom, each only what stands to its left:

    config_file, stacks, presets, packages, ledger < fsdp, picking < ops < activations, losses, optimizers < families
        < models < run < costs, linears < decoders/ < simulate < bill < fitting, claims, published < cli
        (cards < fitting; optimizers, run, losses < traced_losses < traced_models < traced_step < traced_bill < cli)

Only `tracer`, `cuda` and the `traced_...` import torch, and only when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that a type checker sees what these names are
    from .bill import estimate as estimate
    from .cards import Card as Card
    from .fitting import fit as fit
    from .models import ModelSpec as ModelSpec
    from .run import Serving as Serving
    from .run import Training as Training
    from .traced_step import training_step as training_step
    from .tracer import fake as fake
    from .tracer import measure as measure
    from .tracer import trace as trace

# public name -> the module that has it; none is called like a name in here
_HOME = {"ModelSpec": "models", "Card": "cards", "Training": "run", "Serving": "run", "estimate": "bill",
         "fit": "fitting", "trace": "tracer", "fake": "tracer", "measure": "tracer", "training_step": "traced_step"}
__all__ = ["Card", "ModelSpec", "Serving", "Training", "estimate", "fake", "fit", "measure", "trace", "training_step"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'minilora.memory' has no attribute {name!r}")
    return getattr(import_module(f"minilora.memory.{_HOME[name]}"), name)


def __dir__():
    return __all__
