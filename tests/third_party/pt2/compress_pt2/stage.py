"""Write a classifier as a torch.export program."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.models.model import TorchModel
from compress.stages.base import Context, OutputSpec, Requirements, Stage
from compress.tasks.capability import HAS_CLASSES, TAKES_TEXT
from compress_pt2.model import Pt2Model


class Pt2(Stage[TorchModel, Pt2Model]):
    """`.pt2`, with batch and length free, proven equal to torch on real examples."""

    packages = ("torch", "transformers")
    requires = frozenset({HAS_CLASSES, TAKES_TEXT})
    required_data = Requirements(splits=("train",))
    guarantees = OutputSpec(changes_weights=False)
    kind: Literal["pt2"] = "pt2"
    tolerance: float = Field(1e-4, gt=0, description="largest accepted difference of a logit from torch")

    def run(self, model: TorchModel, context: Context) -> Pt2Model:
        """Trace, save, open again, compare. Raises `IntegrityError` where the answers differ."""
        from compress.formats.parity import check_parity, session_answers, torch_answers
        from compress_pt2.runtime import open_bytes, traced

        examples = context.encode("train", model)
        program = traced(model.module, examples)
        session = session_answers(open_bytes(program), examples)
        what = "In the program the logits differ from torch"
        found = check_parity(torch_answers(model.module, examples), session, examples, self.tolerance, what)
        context.note(f"pt2: logits differ by at most {found.worst:.1e} from torch")
        return Pt2Model(program, model.companions())
