"""Whole networks: what is counted, what a step is put down to, the peers' twin, the command; not speed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import onnx
import onnxruntime as ort
import torch
from torch import nn

from benchmarks.networks import __main__ as command
from benchmarks.networks import engines, real, subjects
from benchmarks.networks.arithmetic import Work, floors_ms, layer_work
from benchmarks.networks.breakdown import CLASSES, Step, first_binary, spent_ms
from benchmarks.networks.efficientnet import SameConv2d
from horq_tvm import targets, zoo

KEYS = {
    "network",
    "engine",
    "order",
    "scale",
    "rest",
    "threads",
    "batch",
    "activation",
    "median_ms",
    "min_ms",
    "cold_ms",
}
SIZE = 8
WORK = {
    "stem": Work("stem", 3000),
    "a": Work("a", 1000, "binary", 2),
    "side": Work("side", 500),
    "head": Work("head", 100),
}


def tiny(layers: zoo.Layers, classes: int = 10) -> nn.Module:
    """[N,3,8,8] → [N,10]: a float stem, a HORQ layer of 32 to 32 channels, one of 32 to 64 with its 1×1 shortcut."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        zoo.Block(layers, 32, 32),
        zoo.Block(layers, 32, 64, 2),
        nn.BatchNorm2d(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(zoo.NETWORKS, "tiny", zoo.Architecture(tiny, (3, SIZE, SIZE), 10))
    monkeypatch.setattr(subjects, "ZOO", ("tiny",))
    monkeypatch.setattr(subjects, "CALIBRATION_BATCHES", 1)
    return "tiny"


def subject(folder: Path, activation: str = "signed", batch: int = 1, twin: str = "deployed") -> subjects.Subject:
    (found,) = subjects.find("tiny", batch, [activation], twin, folder)
    return found


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("fused_packed_bitserial_2 1.0.conv", Step("packed_bitserial", "1.0.conv")),
        ("fused_packed_conv2d_0 0.0", Step("packed_conv2d", "0.0")),
        ("packed_conv2d head", Step("packed_conv2d", "head")),
        ("fused_avg_pool2d_13", Step("avg_pool2d", "")),
        ("pad12", Step("pad", "")),
        ("tir_negative", Step("negative", "")),
    ],
)
def test_a_step_is_its_operator_and_its_layer(name: str, step: Step) -> None:
    assert Step.of(name) == step


def test_every_nanosecond_is_in_one_class() -> None:
    names = {
        "transpose": "stem",
        "pad": "stem",
        "fused_packed_conv2d_0 stem": "stem",
        "max_pool2d": "stem",
        "binarize": "binarise",
        "pad1": "binarise",
        "fused_packed_bitserial_1 a": "popcount",
        "multiply1": "epilogue",
        "scales_sample1": "binarise",
        "replicate_pad2": "rest",
        "packed_conv2d side": "rest",
        "mean": "pooling",
        "softmax": "other",
        "split_bitserial2": "binarise",
    }
    ms = [float(2**i) for i in range(len(names))]
    rates = {"binary": 1e-4, "float32": 1e-5}  # of a's 64 ms, 20 are popcount
    spent = spent_ms(list(names), ms, sum(ms) + 0.5, WORK, rates)
    expected = dict.fromkeys(CLASSES, 0.0)
    for name, value in zip(names.values(), ms, strict=True):
        expected[name] += value
    expected["popcount"] -= 44
    expected["epilogue"] += 44
    expected["other"] += 0.5
    assert spent == pytest.approx(expected)


def test_arithmetic_is_never_more_than_the_step_took() -> None:
    spent = spent_ms(["packed_bitserial a"], [5.0], 5.0, WORK, {"binary": 1e-4, "float32": 1.0})
    assert spent["popcount"] == 5.0
    assert spent["epilogue"] == 0.0


def test_the_stem_ends_where_the_first_binary_layer_begins() -> None:
    steps = [
        Step.of(name)
        for name in (
            *("packed_conv2d stem", "max_pool2d"),
            *("scales", "binarize", "pad", "split_bitserial", "packed_bitserial a"),
        )
    ]
    assert first_binary(steps, WORK) == 2
    assert first_binary(steps[:2], WORK) == 0  # a network without binary layers has no stem


def test_the_floor_by_kind() -> None:
    rates = {"binary": 2.0, "float32": 0.5, "int8": 1.0}
    assert floors_ms(WORK.values(), rates) == pytest.approx({"binary": 1e-3, "float32": 7.2e-3})
    mixed = [*WORK.values(), Work("quantised", 2000, "int8"), Work("constant", 1000, "binary", 0)]
    assert floors_ms(mixed, rates) == pytest.approx({"binary": 1e-3, "float32": 7.2e-3, "int8": 2e-3})


@pytest.mark.parametrize("activation", ["signed", "relu"])
def test_work_is_counted_by_hand(small: str, activation: str, tmp_path: Path) -> None:
    work = layer_work(subject(tmp_path, activation, batch=2), 3, "static", {"6": "int8"})
    planes = 3 - (activation == "relu")
    macs = [2 * 64 * 32 * 27, 2 * 64 * 32 * 32 * 9, 2 * 16 * 64 * 32, 2 * 16 * 64 * 32 * 9, 2 * 10 * 64]
    kinds = [("float32", 1), ("binary", planes), ("float32", 1), ("binary", planes), ("int8", 1)]
    expected = sorted((count, *kind) for count, kind in zip(macs, kinds, strict=True))
    assert sorted((w.macs, w.kind, w.planes) for w in work.values()) == expected


def test_the_deployed_twin_has_the_same_convolutions_and_nothing_of_ours() -> None:
    """He et al.'s form: each inner convolution right before a BN, no PReLU, the float layers where they were."""
    for name in ("resnet20", "vgg_small", "quicknet"):
        original = zoo.build(name, "float")
        shapes = sorted(tuple(m.weight.shape) for m in original.modules() if isinstance(m, nn.Conv2d))
        horq = zoo.build(name, 1, "sample")
        inner = [n for n, m in horq.named_modules() if type(m).__name__ == "HorqConv2d"]
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in original.modules())
        twin = subjects.deployed(original, inner).eval()
        assert sorted(tuple(m.weight.shape) for m in twin.modules() if isinstance(m, nn.Conv2d)) == shapes
        assert sum(isinstance(m, nn.BatchNorm2d) for m in twin.modules()) == norms
        assert not any(isinstance(m, (nn.PReLU, zoo.Block)) for m in twin.modules())
        with torch.no_grad():
            assert twin(zoo.example(name)).shape == (1, zoo.architecture(name).classes)


def test_onnxruntime_folds_the_deployed_twin(small: str, tmp_path: Path) -> None:
    """Of its batch normalisations none is left but the head's, which stands behind an addition."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    ort.InferenceSession(str(subject(tmp_path).twin()), options, providers=["CPUExecutionProvider"])
    left = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert left.count("BatchNormalization") == 1
    assert "PRelu" not in left


def test_the_same_twin_keeps_our_nonlinearities(small: str, tmp_path: Path) -> None:
    operators = [node.op_type for node in onnx.load(subject(tmp_path, twin="same").twin()).graph.node]
    assert operators.count("PRelu") == 2


def test_plain_tvm_computes_the_network(small: str, tmp_path: Path) -> None:
    network = subject(tmp_path)
    feeds = subjects.feeds(network)
    setting = engines.Setting(targets.resolve("native"), (1,), 1, 0.01)
    found = engines.plain_tvm(network.twin(), setting, feeds, 1)()
    session = ort.InferenceSession(str(network.twin()), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, dict(feeds))
    result = found if hasattr(found, "numpy") else found[0]
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_first_run_of_a_block_stands_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "BLOCK_NS", 4_000_000)
    evicted = True

    def call() -> None:
        nonlocal evicted
        time.sleep(0.02 if evicted else 0.001)
        evicted = False

    probe = engines.block_probe("net", call)
    evicted = True
    found = probe()
    assert found["net cold"] > 0.02e9 > 2 * found["net"]


def test_of_two_forms_the_faster_is_kept() -> None:
    forms = [engines.Engine("int8", f"int8 {form}", lambda: None, form=form) for form in ("QDQ", "QOperator")]
    mine = [engines.Engine("horq-tvm", f"K{order}", lambda: None, order=order) for order in (1, 2)]
    samples = {"int8 QDQ": [3.0, 1.0, 1.0], "int8 QOperator": [2.0], "K1": [1.0], "K2": [2.0]}
    assert engines.fastest([*mine, *forms], samples) == [*mine, forms[0]]


def test_records_and_tables(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "networks.json"
    words = ["--network", small, "--orders", "1,2", "--activations", "signed,relu", "--seconds", "0.001"]
    assert command.main([*words, "--json", str(out)]) == 0
    records = json.loads(out.read_text())
    assert all(set(record) >= KEYS and record["network"] == small for record in records)
    assert [(r["engine"], r["order"], r["activation"]) for r in records] == [
        ("horq-tvm", 1, "signed"),
        ("horq-tvm", 2, "signed"),
        ("horq-tvm", 2, "relu"),  # order 1 has nothing to compute there
        ("onnxruntime", None, None),
        ("onnxruntime-int8", None, None),
    ]
    for record in records[:3]:
        assert sum(record["breakdown_ms"].values()) == pytest.approx(record["median_ms"])
        assert record["outside_floor"] == pytest.approx(1 - sum(record["floor_ms"].values()) / record["median_ms"])
        assert set(record["speedup"]) == {"onnxruntime", "onnxruntime-int8"}
        assert record["breakdown_ms"]["popcount"] > 0
    # Two planes of which one is known are one plane's arithmetic.
    one, two, relu = (record["floor_ms"]["binary"] * record["peak_gmacs"]["binary"] for record in records[:3])
    assert two == pytest.approx(2 * one)
    assert relu == pytest.approx(one)
    printed = capsys.readouterr().out
    assert "vs ort int8" in printed
    assert "arithmetic floor" in printed


def test_a_float_file_by_its_path_and_an_int8_rest(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = subject(tmp_path).twin()
    words = ["--network", str(path), "--orders", "2", "--scales", "sample", "--rest", "int8", "--peers", "onnxruntime"]
    assert command.main([*words, "--seconds", "0.001", "--json", "-"]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)
    assert (ours["network"], ours["scale"], theirs["engine"]) == (path.stem, "sample", "onnxruntime")
    assert ours["rest"] == "int8"
    assert set(ours["floor_ms"]) == {"binary", "int8"}
    assert ours["breakdown_ms"]["rest"] > 0


def test_threads_in_one_run_and_batches_one_after_the_other(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--network", small, "--orders", "1", "--peers", "onnxruntime", "--threads", "1,2", "--batch", "1,3"]
    assert command.main([*words, "--seconds", "0.001", "--json", str(tmp_path / "out.json")]) == 0
    records = json.loads((tmp_path / "out.json").read_text())
    expected = [
        (batch, threads, engine) for batch in (1, 3) for engine in ("horq-tvm", "onnxruntime") for threads in (1, 2)
    ]
    assert [(r["batch"], r["threads"], r["engine"]) for r in records] == expected
    assert [r["threads"] for r in records if "over_one_thread" in r] == [2] * 4
    assert all(set(r["speedup"]) == {"onnxruntime"} for r in records if r["engine"] == "horq-tvm")
    one, two, *_ = (r["floor_ms"]["binary"] * r["peak_gmacs"]["binary"] for r in records if r["engine"] == "horq-tvm")
    assert one == pytest.approx(2 * two)
    assert "vs 1 thread" in capsys.readouterr().out


def test_without_peers_there_is_no_speedup(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--network", small, "--orders", "1", "--peers", "none", "--seconds", "0.001"]
    assert command.main([*words, "--json", "-"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["engine"], record["speedup"]) == ("horq-tvm", {})


def test_one_thread_is_pinned_while_it_runs() -> None:
    seen = []
    allowed = os.sched_getaffinity(0)
    for threads in (1, 2):
        engines.block_probe("net", lambda: seen.append(os.sched_getaffinity(0)), threads)()
        assert seen[-1] == ({max(allowed)} if threads == 1 else allowed)
    assert os.sched_getaffinity(0) == allowed


def test_peers_get_a_file_whose_batch_is_fixed(small: str, tmp_path: Path) -> None:
    proto = onnx.load(subject(tmp_path).twin())
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(proto, tmp_path / "open.onnx")
    (found,) = subjects.find(str(tmp_path / "open.onnx"), 3, ["signed"], "deployed", tmp_path)
    assert found.shapes == {"image": (3, 3, SIZE, SIZE)}
    axes = onnx.load(found.twin()).graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_value for axis in axes] == [3, 3, SIZE, SIZE]


@pytest.mark.parametrize("batch", [1, 2])
def test_light_topologies_get_weights_and_a_batch(batch: int, tmp_path: Path) -> None:
    """SqueezeNet has no vectors but biases; ShuffleNet batch normalisations, and reshapes that fix a batch of one."""
    for name in ("light_squeezenet", "light_shufflenet"):
        (found,) = subjects.find(name, batch, ["signed"], "deployed", tmp_path)
        proto = onnx.load(found.horq(2, "sample"))
        assert "ConstantOfShape" not in {node.op_type for node in proto.graph.node}
        feeds = subjects.feeds(found)
        (result,) = onnx_run(found.twin(), feeds)
        assert result.shape[:2] == (batch, 1000)
        assert np.isfinite(result).all()
        assert result.std() > 0
        if batch == 2 and name == "light_squeezenet":  # the other's softmax is 1 for one class
            assert not np.array_equal(result[0], result[1])


def test_weights_are_drawn_by_what_they_are_for() -> None:
    """A batch normalisation divides by 1, a kernel keeps the variance behind a ReLU, a batch of one is opened."""
    helper, shapes = onnx.helper, {"w": [64, 8, 3, 3], **{vector: [64] for vector in "bgams"}}
    nodes = [helper.make_node("ConstantOfShape", [f"{name}_shape"], [name]) for name in shapes]
    nodes += [
        helper.make_node("Conv", ["x", "w", "b"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "g", "a", "m", "s"], ["n"]),
        helper.make_node("Reshape", ["n", "flat"], ["y"]),
    ]
    integers = {f"{name}_shape": shape for name, shape in shapes.items()} | {"flat": [1, 64]}
    weights = [onnx.numpy_helper.from_array(np.array(value, "int64"), name) for name, value in integers.items()]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 8, 3, 3])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 64])
    sizes = [helper.make_tensor_value_info(w.name, onnx.TensorProto.INT64, w.dims) for w in weights]  # as IR 3 has it
    graph = helper.make_graph(nodes, "light", [x, *sizes], [y], weights)
    proto = real.drawn(helper.make_model(graph, ir_version=3), 5)
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    assert {name: set(found[name].tolist()) for name in "bgams"} == {"b": {0}, "g": {1}, "a": {0}, "m": {0}, "s": {1}}
    assert found["w"].var() == pytest.approx(2 / 72, rel=0.1)
    assert found["flat"].tolist() == [0, 64]
    assert [value.name for value in proto.graph.input] == ["x"]
    assert [axis.dim_value for axis in proto.graph.input[0].type.tensor_type.shape.dim] == [5, 8, 3, 3]


def onnx_run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return list(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feeds))


@pytest.mark.parametrize("inputs", [{"pixels": 3, "stride": 1}, {"pixels": 8, "stride": 2}, {"pixels": 7, "stride": 2}])
def test_same_padding_is_that_of_onnx(inputs: dict[str, int], tmp_path: Path) -> None:
    """auto_pad SAME_UPPER says what TensorFlow's SAME does."""
    torch.manual_seed(0)
    conv = SameConv2d(2, 3, 5, inputs["stride"], bias=False)
    x = torch.randn(1, 2, inputs["pixels"], inputs["pixels"])
    helper = onnx.helper
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[inputs["stride"]] * 2)
    weight = onnx.numpy_helper.from_array(conv.weight.detach().numpy(), "w")
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "same", ends[:1], ends[1:], [weight]), ir_version=10)
    onnx.save(model, tmp_path / "same.onnx")
    (expected,) = onnx_run(tmp_path / "same.onnx", {"x": x.numpy()})
    np.testing.assert_allclose(conv(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            "--network alexnet",
            "network 'alexnet'; accepted: resnet18, vgg_small, resnet20, quicknet, mobilenet_odd, ",
        ),
        ("--network absent.onnx", "network 'absent.onnx'"),
        ("--orders 9", "found '9'; accepted: orders from 1 to 8"),
        ("--scales batch", "found 'batch'; accepted: patch, sample, static"),
        ("--rest int4", "found 'int4'; accepted: float32, int8"),
        ("--peers openvino", "accepted: onnxruntime, onnxruntime-int8, tvm, none"),
        ("--threads 0", "found '0'; accepted: numbers from 1, as in 1,2"),
        ("--batch 1,x", "found '1,x'"),
        ("--target zen6", "unknown target 'zen6'"),
        ("--json /absent/folder/x.json", "/absent/folder"),
    ],
)
def test_mistakes_in_the_call(words: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words.split()) != 0
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
