"""What nbgrader needs to be told for these notebooks. A course's own nbgrader_config.py says

    from minilora.nbgrader_config import configure
    configure(get_config())

before or after its own settings; nbgrader reads that file in the folder of the course.
"""

from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearOutput,
    NbGraderPreprocessor,
    OverwriteCells,
    OverwriteKernelspec,
)
from traitlets.config import Config

SECONDS = 600  # for one cell: some train for a minute on a slow machine, and nbgrader's own limit is 30 seconds


class ForgetCopies(NbGraderPreprocessor):
    """Of several cells with one grade id the last counts, the others are plain cells. nbgrader's own DeduplicateIds
    leaves a mark on a copy that its next step cannot read, which ends the grading of all who come after."""

    def preprocess(self, nb, resources):
        marked = {}
        for cell in nb.cells:
            grade_id = (cell.metadata.get("nbgrader") or {}).get("grade_id")
            if grade_id is None:
                cell.metadata.pop("nbgrader", None)
            elif grade_id in marked:
                self.log.warning("Cell %r stands more than once: the last one counts", grade_id)
                del marked[grade_id].metadata["nbgrader"]
            if grade_id is not None:
                marked[grade_id] = cell
        return nb, resources


def configure(c: Config) -> None:
    """Sets the time limits, and what is done with copied cells."""
    c.Execute.timeout = SECONDS
    c.Execute.iopub_timeout = 60  # a busy machine may be late with a cell's output
    c.Autograde.sanitize_preprocessors = [ClearOutput, ForgetCopies, OverwriteKernelspec, OverwriteCells,
                                          CheckCellMetadata]
