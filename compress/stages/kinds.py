"""Stages that belong to no format, by kind: the one list of them. Importing this imports no stage."""

from __future__ import annotations

from collections.abc import Mapping

CORE_STAGES: Mapping[str, str] = {
    "finetune": "compress.stages.finetune:Finetune",
    "distill": "compress.stages.distill.stage:Distill",
    "distill_language_model": "compress.stages.distill_language_model.stage:DistillLanguageModel",
    "prune": "compress.stages.prune.stage:Prune",
    "prune_decoder": "compress.stages.prune_decoder.stage:PruneDecoder",
    "sparsify": "compress.stages.sparsify.stages:Sparsify",
    "sparsify_gradually": "compress.stages.sparsify.stages:SparsifyGradually",
    "sparsify_decoder": "compress.stages.sparsify.stages:SparsifyDecoder",
    "trim_vocabulary": "compress.stages.trim_vocabulary:TrimVocabulary",
    "static_embeddings": "compress.stages.static_embeddings.stage:StaticEmbeddings",
    "reduce_dimensions": "compress.stages.reduce_dimensions:ReduceDimensions",
    "qat": "compress.stages.qat.stage:Qat",
    "onnx_int8": "compress.stages.onnx_int8.stage:OnnxInt8",
    "onnx_weight_only": "compress.stages.onnx_weight_only:OnnxWeightOnly",
    "cast": "compress.stages.cast:Cast",
    "equalize": "compress.stages.equalize.stage:Equalize",
    "imatrix": "compress.stages.imatrix.stage:Imatrix",
    "gptq": "compress.stages.gptq.stage:Gptq",
    "block_qat": "compress.stages.block_qat.stage:BlockQat",
    "nncf_weights": "compress.stages.nncf_weights.stage:NncfWeights",
    "tune_scales": "compress.stages.recovery.stages:TuneScales",
    "merge_lora": "compress.stages.lora:MergeLora",
    "lora_recovery": "compress.stages.recovery.stages:LoraRecovery",
    "attach_lora": "compress.stages.lora:AttachLora",
    "compressed_tensors": "compress.stages.compressed_tensors.stage:CompressedTensors",
}
"""Each kind with the class as `module:attribute`."""
