"""Keys of caches from before a field came: what is not set leaves no trace in them, and stays where stages are told."""

from __future__ import annotations

from compress.stages.gptq.stage import Gptq
from compress.stages.prune.stage import Prune
from compress.stages.training.synthetic_data_settings import TeacherWrites
from compress.tasks.evaluation import Evaluation


def test_what_came_later_is_left_out_of_keys_unless_it_is_set() -> None:
    assert "templates" not in Evaluation().model_dump() and "pictures" not in Evaluation().model_dump()
    assert Evaluation(templates=("a {}",)).model_dump()["templates"] == ("a {}",)
    assert "runtime" not in TeacherWrites(conversations=1).model_dump(mode="json")
    assert TeacherWrites(conversations=1, runtime="openvino").model_dump(mode="json")["runtime"] == "openvino"
    assert "fused" not in Gptq().key_fields() and Gptq(fused=True, target_bits=3.5).key_fields()["fused"] is True
    assert (
        "decay" not in Prune(layers=1).key_fields()
        and Prune(layers=1, decay="cosine").key_fields()["decay"] == "cosine"
    )


def test_a_stage_tells_all_its_fields_which_a_search_chooses_among() -> None:
    assert Gptq().model_dump(mode="json")["fused"] is False
