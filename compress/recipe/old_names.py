"""Old names of stages and fields, with the text that tells a recipe's author what to write instead."""

from __future__ import annotations

from typing import Final

_FOR_LANGUAGE_MODELS = "the stage distill_language_model, which trains language models"
_DECODER_PRUNING = "the stage prune_decoder, which prunes language models"
_SPARSIFY = "the stage sparsify, for language models sparsify_decoder, or sparsify_gradually while training"
_GRADUAL = "the stage sparsify_gradually, which trains while weights become zero"

OLD_NAMES: Final = {
    # Stages.
    "eagle3": "a recipe without a draft head: generation with it was only 1.06 to 1.21 times as fast; openvino-genai's "
    "`prompt_lookup` needs no head",
    "export": "onnx, the new name of this stage",
    "lora": "lora_recovery, the new name of this stage",
    "quantize": "onnx_int8, the new name of this stage",
    "quantize_weights": "onnx_weight_only, the new name of this stage",
    "rotate": "`equalize` before the quantization, which lowers its error; rotations never showed a benefit",
    "train_blocks": "block_qat, the new name of this stage",
    # Fields of any stage.
    "decay": "optimizer: {decay: ...}",
    "draft_of": "one model without a draft beside it: pairs were between 0.6 and 1.3 times as fast as the model alone; "
    "openvino-genai's `prompt_lookup` needs no draft",
    "max_gradient_norm": "optimizer: {max_gradient_norm: ...}",
    "warmup_ratio": "optimizer: {warmup_ratio: ...}",
    "weight_decay": "optimizer: {weight_decay: ...}",
    # Fields of one stage.
    "distill.budget": "the stage distill_language_model, or one of distill_features, distill_steps, "
    "distill_consistency and distill_autoencoder, which have a budget",
    "distill.features": "the stage distill_features, which has these fields",
    "distill.fewer_steps": "the stage distill_steps (progressive) or distill_consistency, which have these fields",
    "distill.small_decoder": "the stage distill_autoencoder, which has these fields",
    **{
        f"distill.{name}": _FOR_LANGUAGE_MODELS
        for name in (
            *("direction", "documents", "keep_states", "sequence_length", "teacher_writes", "tokens", "top_k"),
        )
    },
    **{
        f"distill_language_model.{name}": f"loss: {{{name}: ...}}"
        for name in ("direction", "labels_weight", "logits_weight", "temperature", "top_k")
    },
    "distill_language_model.keep_states": "memory: {cache_teacher_states: ...}",
    "prune.denoiser": "the stage prune_denoiser, which has these fields",
    **{f"prune.{name}": _SPARSIFY for name in ("method", "pattern", "sparsity")},
    "prune.schedule": "the stage sparsify (one-shot) or sparsify_gradually (cubic)",
    **{
        f"prune.{name}": _DECODER_PRUNING
        for name in ("damp_percent", "experts", "multiple", "precision", "samples", "sequence_length")
    },
    "prune.bridge": "the stage prune_decoder, which always compensates for removed layers",
    "prune_decoder.bridge": "no such field, since removed layers are always compensated for",
    **{
        f"prune.{name}": _GRADUAL
        for name in (
            *("augment", "batch_size", "decay", "dropout", "epochs", "freeze_embeddings", "keep_best"),
            *("learning_rate", "max_gradient_norm", "warmup_ratio", "weight_decay"),
        )
    },
}
"""Maps an old stage (`rotate`), a field (`draft_of`), or a field of one stage or section (`prune.sparsity`) to the
"expected" part of the error for a recipe that still names it."""
