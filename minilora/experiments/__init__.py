"""The experiments behind the notebooks: adapt the base to a task, and sweeps of such runs, recorded in data/measured/.

    python -m minilora.experiments targets        writes data/measured/targets.json, with the command and the machine

A recorded sweep is a list of rows; every notebook that shows one trains a row of it again and compares. `run` holds
what all share; then there is a room for each notebook or two.
"""

from .bank import adapters, combinations, next_base
from .faults import FAULTS, HEALTHY, barely_moved, examine, faults, forget_alpha, unfreeze, zero_A
from .four_bit import four_bit, in_few_bits
from .merging import SHAPES, interleaved, latency, merged_latency
from .places import targets
from .relatives import FAMILY, family, family_latency
from .run import ATTENTION, EVERYWHERE, LR, MLP, SWEEPS, Run, adapt, grid, measured, record, rounded_row, sweep
from .scaling import limits, norm_of_all, race, ranks, slope, twins, watched
from .shipping import CANDIDATES, candidate, candidates
from .spectra import pooled, rebuilt, shared_directions, spectra, updates
from .wire import exchange, wire, wire_command
