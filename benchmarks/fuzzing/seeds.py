"""Small valid files from which mutations start. Everything is built by code from fixed seeds.

Each function writes one folder per seed below the folder that it gets. Files of equal names in several seeds are of the
same kind, so that their parts can be exchanged.
"""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
for _folder in ("tests/support", "tests/plugins/apps", "tests/plugins/nightly", "benchmarks"):
    if str(ROOT / _folder) not in sys.path:
        sys.path.insert(0, str(ROOT / _folder))

LABELS = ("bad", "good")


def _at(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write(folder: Path, **files: object) -> None:
    """Write one seed per keyword: text, bytes or a value as JSON; the key is `seed__name__suffix`."""
    for key, content in files.items():
        seed, _, name = key.partition("__")
        path = _at(folder, f"{seed}/{name.replace('__', '.')}")
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


# Recipes and other YAML files.


def recipes(folder: Path) -> None:
    """Write three recipes beside a model's config and data."""
    splits = {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"}
    classifier = {
        "name": "tiny", "description": "A tiny recipe.", "task": "text-classification", "model": "model",
        "data": {"splits": splits, "columns": {"text": "text", "label": "label"}, "max_length": 16},
        "stages": [
            {"finetune": {"epochs": 1, "batch_size": 4, "learning_rate": 2e-3}},
            {"distill": {"student": {"layers": [0]}, "epochs": 1}}, {"prune": {"feed_forward": 0.5}},
            {"trim_vocabulary": {}}, "onnx", {"onnx_int8": {}},
        ],
        "baseline": "finetune", "targets": ["cpu", {"litert": {"threads": 2}}],
        "benchmark": {"threads": 1, "budget_seconds": 0.1, "batch_size": 8},
        "slices": [{"name": "short", "column": "text", "contains": "row"}, {"column": "label"}],
        "limits": [{"metric": "accuracy", "at_least": 0.9, "of": "baseline"}, {"metric": "size_bytes", "at_most": 9e6}],
        "gate": {"rules": [{"metric": "accuracy", "worse_by": "0.5 points"}]},
    }  # fmt: skip
    decoder = {
        "name": "decoder", "task": "text-generation", "model": "model", "seed": 3,
        "data": {"splits": {"train": "train.csv", "test": "test.csv"}, "also": {}},
        "stages": [{"gptq": {"bits": 4, "group_size": 32}}, {"gguf": {}}], "targets": ["llama-cpp"],
        "evaluation": {"prompts": 4, "answer_tokens": 4}, "search": {"minimize": ["size_bytes"], "trials": 4},
    }  # fmt: skip
    for seed, recipe in (("0", classifier), ("1", decoder)):
        _write(folder, **{f"{seed}__recipe__yaml": recipe})
        rows = "text,label\n" + "".join(f"row {index},{LABELS[index % 2]}\n" for index in range(8))
        for split in splits.values():
            (folder / seed / split).write_text(rows)
        config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 30}
        _at(folder, f"{seed}/model/config.json").write_text(json.dumps(config))


def suites(folder: Path) -> None:
    """Write a suite of two recipes."""
    suite = {
        "name": "nightly", "description": "x", "budget_minutes": 30, "history": "h.sqlite", "baselines": "baselines",
        "entries": [
            {"recipe": "a.yaml", "targets": ["cpu"], "set": ["seed=1"]},
            {"recipe": "b.yaml", "name": "second"},
        ],
        "policy": {"rules": [{"metric": "accuracy", "worse_by": "1%"}], "cannot_tell": "fail"},
    }  # fmt: skip
    _write(folder, **{"0__suite__yaml": suite, "0__a__yaml": "name: a\n", "0__b__yaml": "name: b\n"})


def policies(folder: Path) -> None:
    """Write a policy, and a recipe with one."""
    policy = {
        "rules": [
            {"metric": "accuracy", "worse_by": "0.5 points", "slices": "worst"},
            {"metric": "latency_ms*", "worse_by": "5%", "cannot_tell": "fail", "confidence": 0.9},
        ],
        "cannot_tell": "warn", "model": "final", "targets": ["cpu"], "time_confidence": 0.99, "session_spread": 0.03,
    }  # fmt: skip
    _write(folder, **{"0__policy__yaml": policy, "1__policy__yaml": {"name": "x", "gate": policy}})


def target_files(folder: Path) -> None:
    """Write descriptions of two targets."""
    phone = {"name": "phone", "runtime": "onnxruntime", "format": "onnx", "threads": 2, "max_bytes": 10**7}
    plain = {"name": "board", "runtime": "litert", "format": "litert", "max_memory_bytes": 10**9, "description": "x"}
    _write(folder, **{"0__target__yaml": phone, "1__target__yaml": plain})


def inventories(folder: Path) -> None:
    """Write an inventory of two devices."""
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKU3bbzvbP4PBKoDqIJF0f0jNXDqC5Y2Wc3hUqEqK1yR"
    pi = {"host": "192.168.1.20", "user": "pi", "key": "~/.ssh/id", "host_key": key}
    board = {**pi, "port": 2222, "python": "python3.12", "cache": "work"}
    _write(folder, **{"0__devices__yaml": {"devices": {"pi": pi, "board": board}}})


# Model files.


def gguf_files(folder: Path) -> None:
    """Write a tiny Llama, and a file with arrays and a quantized tensor."""
    import gguf_samples

    gguf_samples.write_llama(_at(folder, "0/model.gguf"), pre="llama-bpe")
    gguf_samples.write_tensors(_at(folder, "1/model.gguf"))


def _graph(external: bool = False) -> Any:
    """Return an ONNX model with a matrix, a quantized matrix, a branch, a sparse tensor and metadata."""
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(3, 4), "encoder.layer.0.weight")
    small = numpy_helper.from_array(np.ones((2, 3), np.int8), "w_quantized")
    scale = numpy_helper.from_array(np.array([0.5], np.float32), "w_scale")
    half = numpy_helper.from_array(np.ones((2, 2), np.float16), "onnx::MatMul_7")
    ints = helper.make_tensor("shape", TensorProto.INT64, [2], [1, 4])
    names = helper.make_tensor("names", TensorProto.STRING, [2], [b"a", b"b"])
    four = helper.make_tensor("four", TensorProto.INT4, [3], [1, 2, 3])
    inner = [helper.make_node("Identity", ["x"], ["z"], "inner")]
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 4])
    branch = helper.make_graph(inner, "branch", [], [value], [weight.__class__.FromString(half.SerializeToString())])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [2])
    sparse = helper.make_sparse_tensor(helper.make_tensor("sparse", TensorProto.FLOAT, [1], [2.0]), indices, [8])
    nodes = [
        helper.make_node("MatMul", ["x", "encoder.layer.0.weight"], ["a"], "/encoder/layer.0/MatMul"),
        helper.make_node("DequantizeLinear", ["w_quantized", "w_scale"], ["b"], "dequantize"),
        helper.make_node("Constant", [], ["c"], value=ints),
        helper.make_node("If", ["condition"], ["d"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["a", "d"], ["y"], "/encoder/Add"),
    ]
    scopes = "['', 'encoder', 'encoder.layer.0', 'matmul']"
    nodes[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])]
    inputs.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, []))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, [weight, small, scale, names, four])
    if not external:
        graph.sparse_initializer.append(sparse)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def onnx_files(folder: Path) -> None:
    """Write a graph with many kinds of tensors, and a quantized one."""
    from onnx import TensorProto, helper, numpy_helper

    _at(folder, "0/model.onnx").write_bytes(_graph().SerializeToString())
    packed = numpy_helper.from_array(np.zeros((4, 1, 16), np.uint8), "proj_Q4")
    scales = numpy_helper.from_array(np.ones(4, np.float32), "proj_scales")
    options = {"K": 32, "N": 4, "bits": 4, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "proj_Q4", "proj_scales"], ["y"], domain="com.microsoft", **options)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 32), ("y", 4))]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [packed, scales])
    _at(folder, "1/model.onnx").write_bytes(helper.make_model(graph).SerializeToString())


def external_onnx_files(folder: Path) -> None:
    """Write a graph whose tensors lie in another file."""
    import onnx

    model = _graph(external=True)
    data = b""
    for tensor in model.graph.initializer:
        if not tensor.HasField("raw_data"):
            continue
        entries = {"location": "model.onnx_data", "offset": str(len(data)), "length": str(len(tensor.raw_data))}
        data += tensor.raw_data + bytes(-len(tensor.raw_data) % 16)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
    _at(folder, "0/model.onnx").write_bytes(model.SerializeToString())
    _at(folder, "0/model.onnx_data").write_bytes(data)


def ort_files(folder: Path) -> None:
    """Write two graphs in ONNX Runtime's format."""
    import onnx_graphs  # noqa: F401, its folder is on the path

    from compress.formats.ort.stage import convert

    onnx_files(folder)
    for seed in ("0", "1"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = _at(folder, f"{seed}/model.onnx")
            if seed == "0":
                model = _graph(external=True)
                del model.graph.initializer[3:]
                source.write_bytes(model.SerializeToString())
            convert(source, folder / seed / "model.ort")
        source.unlink()


def litert_files(folder: Path) -> None:
    """Write a LiteRT file of one graph with a float and an 8-bit tensor."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    def tensor(name: bytes, kind: int, shape: list[int], buffer: int, scale: float | None = None) -> Any:
        made = schema.TensorT()
        made.name, made.type, made.shape, made.buffer = name, kind, shape, buffer
        if scale is not None:
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale, made.quantization.zeroPoint = [scale], [0]
        return made

    model = schema.ModelT()
    model.version, model.description, model.buffers = 3, b"tiny", []
    contents = (b"", np.ones((3, 4), np.float32).tobytes(), bytes(range(8)))
    for content in contents:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(content, np.uint8) if content else None
        model.buffers.append(buffer)
    graph = schema.SubGraphT()
    kinds = schema.TensorType
    graph.tensors = [
        tensor(b"input", kinds.FLOAT32, [1, 3], 0),
        tensor(b"weight", kinds.FLOAT32, [3, 4], 1),
        tensor(b"quantized", kinds.INT8, [2, 4], 2, 0.5),
    ]
    graph.inputs, graph.outputs, graph.operators, graph.name = [0], [1], [], b"main"
    model.subgraphs, model.operatorCodes = [graph], []
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    _at(folder, "0/model.tflite").write_bytes(bytes(builder.Output()))


def openvino_files(folder: Path) -> None:
    """Write an IR with float, packed and index constants."""
    constants = (("embed.weight", "f32", "2,4", 0, 32), ("proj.weight", "u4", "8,2", 32, 8), ("axis", "i64", "", 40, 8))
    layers = "".join(
        f'<layer id="{index}" name="{name}" type="Const" version="opset1"><data element_type="{kind}" shape="{shape}" '
        f'offset="{offset}" size="{size}"/><output><port id="0" precision="FP32"><dim>2</dim></port></output></layer>'
        for index, (name, kind, shape, offset, size) in enumerate(constants)
    )
    loop = '<layer id="9" name="loop" type="Loop"><body><layers><layer id="0" name="inner" type="Const"><data '
    loop += 'element_type="f16" shape="2" offset="48" size="4"/></layer></layers></body></layer>'
    content = f'<?xml version="1.0"?>\n<net name="model" version="11"><layers>{layers}{loop}</layers><edges/></net>\n'
    _write(folder, **{"0__model__xml": content, "0__model__bin": bytes(64)})


def safetensors_files(folder: Path) -> None:
    """Write tensors of several types."""
    from safetensors.numpy import save_file

    floats = {"encoder.layer.0.weight": np.ones((3, 4), np.float32), "encoder.layer.0.bias": np.zeros(3, np.float32)}
    others = {"position_ids": np.arange(6)[None], "half": np.ones((2, 2), np.float16), "flag": np.array([True])}
    _at(folder, "0/model.safetensors")
    save_file(floats | others, folder / "0/model.safetensors", metadata={"format": "pt"})
    _at(folder, "1/model.safetensors")
    save_file({"a": np.ones((8, 2), np.uint8), "b": np.array(1.5)}, folder / "1/model.safetensors")


# Model folders.


def _classifier(folder: Path) -> Path:
    """Write a one-layer BERT of a few kilobytes with a classification head."""
    import torch
    from tiny import label_maps
    from tiny_run import tokenizer
    from transformers import BertConfig, BertForSequenceClassification

    words = tokenizer()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes, **label_maps(LABELS))
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    BertForSequenceClassification(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def classifiers(folder: Path) -> None:
    """Write a tiny BERT and a tiny Llama, whose tokenizer has a chat template."""
    from quantized import save_tiny_llama

    _classifier(folder / "0")
    (folder / "0/README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- a\n---\n# Tiny\n")
    (folder / "0/LICENSE").write_text("SPDX-License-Identifier: MIT\n")
    save_tiny_llama(folder / "1", hidden_size=32, num_hidden_layers=1, intermediate_size=32)
    config = json.loads((folder / "1/config.json").read_text())
    text = {"vocab_size": 160, "max_position_embeddings": 256}
    (folder / "1/config.json").write_text(json.dumps(config | {"text_config": text}))
    for seed, labels in (("0", ["[CLS]", "[SEP]"]), ("1", ["<s>", "</s>"])):
        special = {"cls_token": labels[0], "sep_token": {"content": labels[1], "lstrip": False}}
        (folder / seed / "special_tokens_map.json").write_text(json.dumps(special))


def tokenizers(folder: Path) -> None:
    """Write tokenizers of four kinds."""
    import tiny

    for seed, tokenizer in enumerate((tiny.word_piece(), tiny.byte_level(), tiny.byte_fallback(), tiny.unigram())):
        tokenizer.save_pretrained(folder / str(seed))
        config = {"model_type": "bert", "vocab_size": 4000, "max_position_embeddings": 32}
        (folder / str(seed) / "config.json").write_text(json.dumps(config))


def sharded(folder: Path) -> None:
    """Write a model in two shards with an index."""
    from safetensors.numpy import save_file

    _classifier(folder / "0")
    (folder / "0/model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weights = {}
    for index, name in enumerate(names):
        tensors = {f"layer.{index}.weight": np.ones((2, 2), np.float32), f"layer.{index}.bias": np.ones(2, np.float32)}
        save_file(tensors, folder / "0" / name)
        weights |= dict.fromkeys(tensors, name)
    index_file = {"metadata": {"total_size": 48}, "weight_map": weights}
    (folder / "0/model.safetensors.index.json").write_text(json.dumps(index_file))


def quantized_folders(folder: Path) -> None:
    """Write a decoder in GPTQ's layout with an integer table, and one in that of compressed-tensors."""
    import torch
    from quantized import quantize_tiny_llama, rounded, save_tiny_llama
    from safetensors.torch import save_file

    from compress.models.compressed_tensors_layout import pack_layer
    from compress.models.quantization_config import compressed_tensors_config

    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    source = save_tiny_llama(folder / "source", hidden_size=32, intermediate_size=32, **sizes)
    quantize_tiny_llama(source, folder / "0")
    served = folder / "1"
    shutil.copytree(folder / "source", served)
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for name in sorted(source.files):
        module, tensor = name.removesuffix(".weight"), source.stored(name)
        if module.endswith(("q_proj", "k_proj")):
            layers.append(module)
            packed = pack_layer(rounded(tensor, 4, 32))
            tensors |= {f"{module}.{part}": value for part, value in packed.items()}
        else:
            tensors[name] = tensor.half().clone()
    save_file(tensors, served / "model.safetensors")
    settings = compressed_tensors_config(dict.fromkeys(layers, (4, 32)), ["lm_head"], 16, "0.12")
    (served / "config.json").write_text(json.dumps(source.config | {"quantization_config": settings}))
    shutil.rmtree(folder / "source")


def adapters(folder: Path) -> None:
    """Write a LoRA adapter of a tiny Llama."""
    from adapters import save_adapter
    from quantized import tiny_llama_config
    from transformers import LlamaForCausalLM

    config = tiny_llama_config(hidden_size=32, num_hidden_layers=1, intermediate_size=32)
    save_adapter(LlamaForCausalLM(config), folder / "0", "q_proj", "v_proj")


def preprocessors(folder: Path) -> None:
    """Write an image processor, feature extractors of two kinds, and transformers' joint file."""
    from transformers import ASTFeatureExtractor, ViTImageProcessorPil, Wav2Vec2FeatureExtractor

    makers: tuple[Any, ...] = (
        ViTImageProcessorPil(size={"height": 16, "width": 16}),
        Wav2Vec2FeatureExtractor(),
        ASTFeatureExtractor(max_length=32, num_mel_bins=16),
    )
    for seed, processor in enumerate(makers):
        target = folder / str(seed)
        processor.save_pretrained(target)
        (target / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))


def sentence_folders(folder: Path) -> None:
    """Write the modules of a sentence encoder."""
    import sentences
    from safetensors.numpy import save_file

    dense = {
        "in_features": 4,
        "out_features": 2,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    pooling = {"word_embedding_dimension": 4, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    sentences.write_folder(folder / "0", ["Pooling", "Dense", "Normalize"], Pooling=pooling, Dense=dense)
    weights = {"linear.weight": np.ones((2, 4), np.float32), "linear.bias": np.ones(2, np.float32)}
    save_file(weights, folder / "0/2_Dense/model.safetensors")
    (folder / "0/sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, "do_lower_case": False}))


def graph_inputs(folder: Path) -> None:
    """Write the inputs of a graph, and arrays for them."""
    entries = [
        {"name": "ids", "dtype": "int64", "axes": ["batch", 4], "shape": [2, 4], "value": None, "below": 9},
        {"name": "x", "dtype": "float32", "axes": [None, 3], "shape": [2, 3], "value": 1.0, "below": None},
        {"name": "t", "dtype": "str", "axes": [1], "shape": [1], "value": 0.0, "below": None},
    ]
    arrays = io.BytesIO()
    np.savez(arrays, ids=np.zeros((2, 4), np.int64), x=np.ones((2, 3), np.float32), t=np.array(["a"]))
    files = {"0__graph_inputs__json": {"inputs": entries, "unproven": None}, "0__arrays__npz": arrays.getvalue()}
    single = io.BytesIO()
    np.save(single, np.ones((2, 3), np.float32))
    more = {"1__graph_inputs__json": {"inputs": entries[1:2], "unproven": None}, "1__arrays__npz": single.getvalue()}
    _write(folder, **files, **more)


def pipelines(folder: Path) -> None:
    """Write the configs of a diffusion pipeline with tiny weights."""
    from safetensors.numpy import save_file

    classes = {
        "text_encoder": ["transformers", "CLIPTextModel"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None],
    }  # fmt: skip
    configs = {
        "unet": {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 8, "sample_size": 8, "in_channels": 4},
        "text_encoder": {"hidden_size": 8, "vocab_size": 10, "model_type": "clip_text_model"},
        "vae": {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [4, 4]},
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.40", **classes}
    _at(folder, "0/model_index.json").write_text(json.dumps(index))
    for part, config in configs.items():
        _at(folder, f"0/{part}/config.json").write_text(json.dumps(config))
        save_file({"a": np.ones((2, 2), np.float32)}, folder / "0" / part / "diffusion_pytorch_model.safetensors")
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 10, "beta_start": 0.1, "beta_end": 0.2}
    _at(folder, "0/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2}
    _at(folder, "0/tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    _at(folder, "0/tokenizer/merges.txt").write_text("#version: 0.2\n")
    _at(folder, "0/tokenizer/tokenizer_config.json").write_text(json.dumps({"model_max_length": 8}))


# Data.


def _rows() -> list[dict[str, Any]]:
    words = (
        "great film",
        "awful plot",
        "superb cast, really",
        'a "dull" story',
        "\u00e9t\u00e9 \U0001f600",
        "fine\nend",
    )
    return [{"text": f"{word} {index}", "label": LABELS[index % 2], "n": index} for index, word in enumerate(words * 2)]


def _with_test(folder: Path) -> None:
    """Write test rows into each seed, with the names of columns that the rows of the seed have."""
    for seed in folder.iterdir():
        rows = [{**row, "text": f"other {row['text']}"} for row in _rows()]
        nested = any(b'"doc"' in path.read_bytes() for path in seed.iterdir())
        written = [{"doc": {"body": row["text"]}, "label": row["label"]} if nested else row for row in rows]
        (seed / "test.json").write_text(json.dumps(written))


def tables(folder: Path) -> None:
    """Write rows as CSV with commas, and with semicolons in UTF-16."""
    import csv

    for seed, separator, encoding in (("0", ",", "utf-8"), ("1", ";", "utf-8-sig"), ("2", ",", "utf-16")):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["text", "label", "n"], delimiter=separator)
        writer.writeheader()
        writer.writerows(_rows())
        _at(folder, f"{seed}/rows.csv").write_bytes(text.getvalue().encode(encoding))
    _with_test(folder)


def tab_tables(folder: Path) -> None:
    """Write rows as TSV, among them the words and tags of a token classifier."""
    rows = "".join(f"word {index}\t{LABELS[index % 2]}\n" for index in range(8))
    _write(folder, **{"0__rows__tsv": "text\tlabel\n" + rows})
    _with_test(folder)


def line_files(folder: Path) -> None:
    """Write rows as lines of JSON, also nested ones."""
    _write(folder, **{"0__rows__jsonl": "".join(json.dumps(row) + "\n" for row in _rows())})
    nested = [{"doc": {"body": row["text"], "meta": {"label": row["label"]}}, "label": row["label"]} for row in _rows()]
    _write(folder, **{"1__rows__jsonl": "".join(json.dumps(row) + "\n" for row in nested)})
    _with_test(folder)


def json_tables(folder: Path) -> None:
    """Write rows as a JSON array, also nested ones."""
    nested = [{"doc": {"body": row["text"]}, **{key: row[key] for key in ("label", "n")}} for row in _rows()]
    _write(folder, **{"0__rows__json": _rows(), "1__rows__json": nested})
    _with_test(folder)


def parquet_files(folder: Path) -> None:
    """Write rows as Parquet, with nested, dictionary and binary columns."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = _rows()
    plain = pa.table({name: [row[name] for row in rows] for name in ("text", "label", "n")})
    typed = pa.table(
        {
            "text": pa.array([row["text"] for row in rows]).dictionary_encode(),
            "label": pa.array([row["label"] for row in rows]).dictionary_encode(),
            "n": pa.array([index % 2 for index in range(len(rows))], pa.int8()),
            "list": pa.array([[1, None], []] * 6, pa.list_(pa.int64())),
            "when": pa.array([0, 10**9] * 6, pa.timestamp("us", "UTC")),
            "file": pa.array([{"bytes": b"\x89PNG", "path": "a.png"}] * 12),
        }
    )
    for seed, table, options in (
        ("0", plain, {}),
        ("1", typed, {"compression": "zstd"}),
        ("2", plain, {"version": "1.0"}),
    ):
        pyarrow.parquet.write_table(table, _at(folder, f"{seed}/rows.parquet"), **options)
    _with_test(folder)


def text_files(folder: Path) -> None:
    """Write lines of text in UTF-8, UTF-16 and Windows-1252."""
    lines = "".join(f"{row['text']}\n" for row in _rows()).replace("\U0001f600", "")
    for seed, encoding in (("0", "utf-8"), ("1", "utf-16"), ("2", "cp1252")):
        _at(folder, f"{seed}/rows.txt").write_bytes(lines.encode(encoding))


def images(folder: Path) -> None:
    """Write small images in seven formats and modes; the suffix does not matter to the reader."""
    from PIL import Image

    pixels = (np.arange(12 * 10 * 3) % 255).astype(np.uint8).reshape(12, 10, 3)
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    made: list[tuple[Any, str, dict[str, Any]]] = [
        (picture, "png", {}),
        (picture.convert("RGBA"), "png", {}),
        (picture.convert("P"), "png", {"transparency": 3}),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 200), "png", {}),
        (picture, "jpeg", {"exif": exif}),
        (picture, "gif", {"save_all": True, "append_images": [picture.rotate(90)]}),
        (picture, "bmp", {}),
        (picture, "tiff", {}),
        (picture, "webp", {}),
        (picture.convert("L"), "ppm", {}),
    ]
    for seed, (image, kind, options) in enumerate(made):
        image.save(_at(folder, f"{seed}/image"), kind, **options)


def masks(folder: Path) -> None:
    """Write images with masks and boxes."""
    from PIL import Image

    Image.new("RGB", (10, 8)).save(_at(folder, "0/image.png"))
    ids = Image.fromarray((np.arange(80) % 3).astype(np.uint8).reshape(8, 10))
    ids.save(_at(folder, "0/mask.png"))
    objects = {"bbox": [[0, 0, 4, 4.5], [1, 1, 2, 2]], "category": ["cat", 3]}
    _write(folder, **{"0__objects__json": objects})
    shutil.copytree(folder / "0", folder / "1")
    listed = [{"bbox": [0, 0, 1, 1], "category_id": 1}, {"bbox": [1, 2, 3, 4], "category_id": "dog"}]
    _write(folder, **{"1__objects__json": listed})


def recordings(folder: Path) -> None:
    """Write short recordings in five encodings; the suffix does not matter to the reader."""
    import soundfile

    samples = np.sin(np.arange(800) / 5).astype(np.float32)
    both = np.stack([samples, samples], axis=1)
    made = (
        (samples, "WAV", "PCM_16", 16_000),
        (both, "WAV", "FLOAT", 8000),
        (samples, "FLAC", "PCM_16", 16_000),
        (samples, "OGG", "VORBIS", 16_000),
        (samples, "WAV", "ULAW", 22_050),
    )
    for seed, (values, kind, subtype, rate) in enumerate(made):
        buffer = io.BytesIO()
        soundfile.write(buffer, values, rate, format=kind, subtype=subtype)
        _write(folder, **{f"{seed}__recording": buffer.getvalue()})


def judged(folder: Path) -> None:
    """Write questions, rated pairs and instructions."""
    questions = [{"prompt": f"q{i}", "choices": ["a", "b", "c"], "answer": i % 3} for i in range(4)]
    pairs = [{"text": f"t{i}", "pair": f"p{i}", "score": i / 4} for i in range(5)]
    checks = ({"words": 3}, {"contains": ["a"]}, {"json_keys": ["x"]}, {"starts_with": "y", "upper_case": True})
    instructions = [{"prompt": f"p{i}", "checks": check} for i, check in enumerate(checks)]
    named = {"questions": questions, "pairs": pairs, "instructions": instructions}
    lines = {f"0__{name}__jsonl": "".join(json.dumps(row) + "\n" for row in rows) for name, rows in named.items()}
    _write(folder, **lines)


def traffic(folder: Path) -> None:
    """Write requests with times and late labels."""
    rows: list[dict[str, Any]] = [{"id": f"r{i}", "at": 10.5 + i, "text": f"t{i}"} for i in range(5)]
    rows += [{"id": "r1", "label": "good"}, {"at": "2026-01-01T00:00:00Z", "text": "z", "id": 7, "label": "bad"}]
    _write(folder, **{"0__requests__jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    _write(folder, **{"0__late__jsonl": '{"id": "r2", "label": "bad"}\n{"id": "r3", "label": "good"}\n'})


# Runs, bundles, registries.


def _report() -> Any:
    """Return the invented report of the tests with short samples."""
    path = ROOT / "tests/report/conftest.py"
    spec = importlib.util.spec_from_file_location("report_conftest", path)
    assert spec is not None and spec.loader is not None, "the file exists"
    module = importlib.util.module_from_spec(spec)
    sys.modules["report_conftest"] = module
    spec.loader.exec_module(module)
    report = module.make_report()
    rows = [row for row in report.measurements if row.model in ("baseline", "final")]
    short = [row.model_copy(update={"raw": row.raw and row.raw[:6]}) for row in rows]
    layers = {name: layers[:2] for name, layers in report.bytes_by_layer.items()}
    fewer: dict[str, Any] = {"measurements": tuple(short), "slices": {}, "bytes_by_layer": layers}
    fewer |= {name: getattr(report, name)[:2] for name in ("stages", "integrity", "calibration", "limits")}
    return report.model_copy(update=fewer)


def reports(folder: Path) -> None:
    """Write the report of a classifier, that of a text generator, and an old small one."""
    import generation_reports

    _write(folder, **{"0__report__json": _report().to_json()})
    _write(folder, **{"1__report__json": generation_reports.generation_report().to_json()})
    row = {"model": "final", "metric": "accuracy", "target": "cpu", "value": 0.5, "unit": "ratio"}
    small = {"schema": 1, "recipe": "r", "measurements": [row]}
    _write(folder, **{"2__report__json": small})


def baselines(folder: Path) -> None:
    """Write the baseline file of a report, beside a run's report."""
    from compress.report.compare.baseline import BaselineOrigin, write_baseline

    report = _report()
    origin = BaselineOrigin.model_validate(
        {"who": "a", "when": "2026-01-01T00:00:00+00:00", "why": "first", "commit": None}
    )
    write_baseline(report, _at(folder, "0/baseline.json"), origin)
    _write(folder, **{"0__report__json": report.to_json()})


def predictions(folder: Path) -> None:
    """Write the table of a run's predictions."""
    import pyarrow as pa
    import pyarrow.parquet

    columns = {
        "row": pa.array(np.arange(6, dtype=np.int32)),
        "label": pa.array(LABELS * 3).dictionary_encode(),
        "final.answer": pa.array(LABELS * 3).dictionary_encode(),
        "final.probability": pa.array(np.ones(6, np.float32)),
        "final.correct": pa.array([True] * 6),
    }
    pyarrow.parquet.write_table(pa.table(columns), _at(folder, "0/predictions.parquet"))


def runs(folder: Path) -> None:
    """Write a run with its lock and provenance."""
    from registry import write_run

    from compress.plugins.provenance.slsa import STATEMENT
    from compress.report.run_folder import shipped_files
    from compress.utils.storage import digest_file

    run = write_run(folder / "0", b"weights")
    subject = [{"name": name, "digest": {"sha256": digest_file(run / name)}} for name in shipped_files(run)]
    definition = {"buildType": "x", "externalParameters": {"recipe": {"name": "tiny"}}, "resolvedDependencies": []}
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subject,
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {"buildDefinition": definition, "runDetails": {"builder": {"id": "compress"}}},
    }
    (run / STATEMENT).write_text(json.dumps(statement))
    lock = {"seed": 0, "packages": {"torch": "2.0"}, "stages": {"onnx": "0" * 64}, "start": "none"}
    (run / "lock.json").write_text(json.dumps(lock))


def bundles(folder: Path) -> None:
    """Build a bundle of a toy classifier: a folder, and its zip."""
    from toy_bundles import wanted_of, write_run

    from compress.plugins.apps.build import build
    from compress.utils.progress import SilentProgress

    run = write_run(folder / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = build(wanted_of(run, "desktop"), folder / "built", SilentProgress())
    shutil.copytree(made.folder, folder / "0/bundle")
    shutil.copyfile(made.archive, folder / "0/bundle.zip")
    for name in ("run", "built"):
        shutil.rmtree(folder / name)


def registries(folder: Path) -> None:
    """Write a registry with three versions, a promotion, a rollback and a retirement."""
    from registry import write_run

    from compress.plugins.registry.promotion import PromotionRequest, promote
    from compress.plugins.registry.registry import Registry

    registry = Registry(folder / "0/registry")
    for number in range(3):
        registry.register(write_run(folder / f"run-{number}", b"weights %d" % number), "m", note="a")
    for number in (1, 2):
        promote(registry, PromotionRequest(f"m@{number}", force=True, why="w"))
    registry.rollback("m", "champion")
    registry.retire("m@3")
    for number in range(3):
        shutil.rmtree(folder / f"run-{number}")


def ledgers(folder: Path) -> None:
    """Write the ledger of a search with a finished and a failed trial."""
    from compress.plugins.search.observations import Ledger, LedgerEntry, LedgerHeader
    from compress.plugins.search.outcome import TrialOutcome, pack_rows

    rows = {"final": {"accuracy": pack_rows((1.0, 0.0))}, "baseline": {"accuracy": pack_rows((1.0, 1.0))}}
    outcome = TrialOutcome(
        model="d" * 64, final={"accuracy": 0.5, "size_bytes": 10.0}, baseline={"accuracy": 0.6},
        spread={"accuracy": (0.4, 0.6)}, rows=rows, seconds=1.5,
    )  # fmt: skip
    _at(folder, "0/x")
    ledger = Ledger(folder / "0")
    search = {"budget": "2h", "trials": 9}
    recipe = {"name": "tiny", "search": search}
    ledger.create(LedgerHeader(recipe=recipe, knobs=(("prune", (True, 2)),), rungs=(0.5, 1.0), machine={"cores": 2}))
    point = {"point": (0, 1), "rung": 1, "words": "w", "identity": "i", "elapsed": 3.0}
    ledger.append(LedgerEntry(number=0, outcome=outcome, **point))
    ledger.append(LedgerEntry(number=1, outcome=TrialOutcome(error="failed", seconds=1.0), **point))


def histories(folder: Path) -> None:
    """Write the history of three nights."""
    from nights import fill, ignore, night, outcome, row

    from compress.plugins.nightly.history import NightHistory

    history = NightHistory(_at(folder, "0/history.sqlite"), ignore)
    fill(history, (1.0, 2.0))
    finding = {"entry": "tiny", "kind": "gate", "metric": "accuracy", "target": "cpu", "effect": -0.1, "what": "lower"}
    history.append(night(2, [outcome(notes=("a",))], [_finding(finding)]), {"tiny": (row("accuracy", 0.5, "ratio"),)})
    for path in folder.glob("0/*"):
        if path.name != "history.sqlite":
            path.unlink() if path.is_file() else shutil.rmtree(path)


def _finding(fields: dict[str, Any]) -> Any:
    from compress.plugins.nightly.record import NightFinding

    return NightFinding.model_validate({**fields, "since": "1"})


def records(folder: Path) -> None:
    """Write the record of a registry's version."""
    files = {
        "report.json": {"size_bytes": 3, "sha256": "0" * 64},
        "model/a.onnx": {"size_bytes": 9, "sha256": "1" * 64},
    }
    record = {"schema": 1, "recipe": "tiny", "started": "2026-01-01T00:00:00+00:00", "files": files}
    _write(folder, **{"0__record__json": record})


def templates(folder: Path) -> None:
    """Write a chat template with loops, conditions and tokens."""
    plain = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    tools = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{%- set n = namespace(x=1) -%}"
    )
    ending = "{% if add_generation_prompt %}<assistant>{% endif %}{{ messages | length }}{{ strftime_now('%Y') }}"
    _write(folder, **{"0__chat_template__jinja": plain + ending, "1__chat_template__jinja": tools + plain})


def cards(folder: Path) -> None:
    """Write a folder with a model card and little else."""
    safetensors_files(folder)
    front = "license: other\nlicense_name: llama\nlanguage:\n- en\n- de\nwidget:\n- text: a\n"
    for seed in ("0", "1"):
        _at(folder, f"{seed}/README.md").write_text(f"---\n{front}---\n# Model\n\nText\n")
        _at(folder, f"{seed}/config.json").write_text(json.dumps({"model_type": "bert", "license": "MIT License"}))


def generation_folders(folder: Path) -> None:
    """Write configs of models that write, look and listen."""
    text = {"vocab_size": 160, "max_position_embeddings": 256, "eos_token_id": 2}
    config = {"model_type": "whisper", "image_token_id": 7, "text_config": text, "max_target_positions": 448}
    tokens = {"eos_token_id": [2, 3], "bos_token_id": 1, "decoder_start_token_id": 1, "no_timestamps_token_id": 9}
    rules = {"max_length": 20, "min_length": 1, "max_new_tokens": 8, "do_sample": False, "num_beams": 1}
    languages = {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": 5},
        "task_to_id": {"transcribe": 6},
        "language": "en",
    }
    suppressed = {
        "suppress_tokens": [1, 2],
        "begin_suppress_tokens": [4],
        "bad_words_ids": [[3]],
        "length_penalty": 1.0,
    }
    for seed, given in (("0", tokens | rules), ("1", tokens | rules | languages | suppressed)):
        _write(folder, **{f"{seed}__config__json": config, f"{seed}__generation_config__json": given})
