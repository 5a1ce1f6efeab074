"""`horq_tvm.build`: a model in, a compiled model out."""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm

from . import agreement, calibration, layers, pipeline, targets
from . import rest as unbinarised
from .cuda import toolkit
from .emit import standalone, virtual_machine
from .errors import HorqError, UsageError
from .files import replacing
from .frontend import ImportedModel
from .manifest import LayerRecord, Manifest
from .plan import Plan, load_plan
from .relay_passes.fold_constant_plane import relu_fed_layers
from .relay_passes.fuse_epilogue import LAYER_ATTR
from .relay_passes.rewrite_layers import TAP_NAMES
from .runtime.loader import LoadedModel, load
from .schedules import int8
from .specs import EMITS, RESTS, Emit, LayerConfig, Rest, TensorSpec
from .straightline import fields_of, read_main
from .tuning.database import Database, shipped_database, user_database
from .tuning.lookup import Lookup

if TYPE_CHECKING:
    import onnx
    import torch

Progress = Callable[[str], None]
TRAINING = "docs/training.md says how to train for HORQ"


class _Folder:
    """A temporary folder that lasts as long as something refers to it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="horq-tvm-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class CompiledModel:
    """A library in a temporary folder; `export` puts it where it shall stay."""

    library: Path
    report: Mapping[str, Any]
    _folder: _Folder

    def export(self, path: str | Path) -> Path:
        """Copies the library to `path`, under a temporary name first. HorqError where the path is not writable."""
        out = Path(path).absolute()
        with replacing(out) as partial:
            shutil.copy(self.library, partial)
        return out

    def load(self, threads: int = 1) -> LoadedModel:
        """The library, loaded; see `horq_tvm.load`."""
        return load(self.library, threads=threads)

    def __call__(self, /, *arrays: np.ndarray, **named: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the model once; see `LoadedModel`."""
        return self.load()(*arrays, **named)


def build(
    model: str | Path | onnx.ModelProto | torch.nn.Module | torch.export.ExportedProgram,
    target: str | targets.Target = "native",
    *,
    order: int | str | None = None,
    scale: str | None = None,
    plan: str | Path | Mapping[str, Any] | Plan | None = None,
    calibration: Mapping[str, np.ndarray] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    rest: Rest = "float32",
    taps: Sequence[str] = (),
    database: str | Path | None = None,
    emit: Emit | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """Compiles a CNN for a target.

    Args:
        model: an .onnx or .pt2 path, an ONNX proto, an nn.Module (with `example_inputs`) or an ExportedProgram.
        target: a name of `horq-tvm targets`, or a Target.
        order: planes K of an activation, 1 to 8, or "float" to rewrite nothing. Unless given, 2, and layers beside a
            model's own HORQ nodes stay float.
        scale: `patch`, `sample` or `static`; unless given, `sample`.
        plan: the per-layer plan (horq_tvm/plan.py shows one), as a path, a dict or a Plan.
        calibration: arrays by input name, axis 0 the samples; `static` layers without betas are fitted to it.
        example_inputs: of an nn.Module, the tensors of one call, (x, ...).
        input_shapes: shapes of inputs that the model leaves dynamic.
        rest: arithmetic of the layers that stay unbinarised, "float32" or "int8": weights a filter, activations a
            layer, their ranges from the calibration data, else from 8 seeded random inputs.
        taps: layers whose input, β, planes and output become outputs of the library.
        database: what `tune` found, by default the folder `tuning` of the user's cache where there is one, and behind
            it, for kernels that it knows nothing of, the small database of the package.
        emit: "standalone", a library that needs libc alone, or "tvm", one for TVM's runtime; unless given, what the
            target can have: for a card "tvm".
        progress: called with what is being done.

    Raises:
        UsageError: a mistake in the call. HorqError: a database or a model that cannot be read, a model that cannot be
            compiled.
    """
    if isinstance(taps, str):
        raise UsageError(f"taps: found the text {taps!r}; accepted: a list of layer names")
    resolved = _resolved(target)
    form = _form(emit, resolved)
    lookup = _lookup(database, resolved)
    session = _open(model, resolved, example_inputs, input_shapes, calibration, rest, progress, form=form)
    choices = session.choose(plan, order, scale)
    _check_taps(taps, choices)
    _warn_of_nothing(choices, order)
    return session.compile(session.calibrate(choices), taps, choices, lookup)


def rewritten(model: Any, target: targets.Target, **options: Any) -> tvm.IRModule:
    """What `build` with these options hands to `emit`; nothing is compiled for the target, nothing judged."""
    known = ("example_inputs", "input_shapes", "calibration", "rest", "progress")
    given = [{"rest": "float32", **options}.get(name) for name in known]
    session = _open(model, target, *given, form="standalone")
    choices = session.choose(*(options.get(name) for name in ("plan", "order", "scale")))
    taps = options.get("taps", ())
    _check_taps(taps, choices)
    return session.rewrite(session.calibrate(choices), taps, choices).module


def _open(
    model: Any,
    target: targets.Target,
    example_inputs: tuple[Any, ...] | None,
    input_shapes: Mapping[str, tuple[int, ...]] | None,
    data: Mapping[str, np.ndarray] | None,
    rest: Any,
    progress: Progress | None,
    *,
    form: Emit,
) -> _Session:
    _check_rest(rest, target)
    say = progress or (lambda _message: None)
    say("importing the model")
    imported = _import(model, example_inputs, input_shapes)
    canonical = pipeline.canonicalise()(imported.mod)
    return _Session(imported, canonical, tuple(layers.enumerate_layers(canonical)), target, data, rest, say, form)


def _resolved(target: str | targets.Target) -> targets.Target:
    return target if isinstance(target, targets.Target) else targets.resolve(target)


def _lookup(folder: str | Path | None, target: targets.Target) -> Lookup:
    """The databases to build with: `folder` alone, else that of the user's cache (out of use with a fault in its
    format) and behind it the package's."""
    if folder is not None:
        return Lookup(Database.open(folder), target)
    own = None
    try:
        own = user_database()
    except HorqError as error:
        warnings.warn(f"built without the tuning database of the cache: {error}", stacklevel=3)
    return Lookup(own, target, shipped_database())


@dataclass(frozen=True)
class _Rewritten:
    """The module that `emit` takes, its manifest, and the ranges of its int8 layers, if it has such."""

    module: tvm.IRModule
    manifest: Manifest
    calibrated: unbinarised.Calibrated | None


@dataclass(frozen=True)
class _Session:
    """One model on its way to one target."""

    imported: ImportedModel
    canonical: tvm.IRModule
    found: tuple[layers.Layer, ...]
    target: targets.Target
    data: Mapping[str, np.ndarray] | None
    rest: Rest
    say: Progress
    form: Emit

    def choose(self, plan: Any, order: int | str | None, scale: str | None) -> dict[str, layers.Choice]:
        """What becomes of each layer."""
        loaded = plan if isinstance(plan, Plan) or plan is None else load_plan(plan)
        return dict(layers.choose(self.found, plan=loaded, trained=self.imported.trained, order=order, scale=scale))

    def calibrate(self, choices: Mapping[str, layers.Choice]) -> dict[str, LayerConfig]:
        """The configs of the layers that are rewritten, `static` ones without betas fitted to the calibration data."""
        configs = {name: choice.config for name, choice in choices.items() if choice.config is not None}
        open_layers = [n for n, c in configs.items() if c.scale == "static" and c.betas is None]
        if not open_layers:
            return dict(configs)
        if self.data is None:
            raise UsageError(
                f"layer {open_layers[0]}: scale static without betas and without calibration data; accepted: betas in"
                " the plan, --calibration X.npz, or scale sample"
            )
        return calibration.fit(self.canonical, self.imported.inputs, self.host, configs, self.data, self.say)

    @property
    def host(self) -> targets.Target:
        """The target if this machine can run it, else this machine: both compute the same integers."""
        return targets.runnable(self.target)

    def compile(
        self,
        configs: Mapping[str, LayerConfig],
        taps: Sequence[str],
        choices: Mapping[str, layers.Choice],
        lookup: Lookup,
    ) -> CompiledModel:
        """The library of the model with `configs` rewritten."""
        made = self.rewrite(configs, taps, choices)
        compiled = emit(made.module, self.target, made.manifest, self.say, lookup, self.form)
        if made.calibrated:
            compiled = self._judge_rest(compiled, made.module, made.manifest, made.calibrated)
        untrained = [name for name, config in configs.items() if self.imported.trained.get(name) != config]
        return self._judge(compiled, made.module, made.manifest, untrained)

    def rewrite(
        self, configs: Mapping[str, LayerConfig], taps: Sequence[str], choices: Mapping[str, layers.Choice]
    ) -> _Rewritten:
        """The model with `configs` rewritten, before anything depends on the target."""
        self.say("rewriting layers")
        module = pipeline.rewrite(configs, taps)(self.canonical)
        _warn_of_relus(relu_fed_layers(module))
        calibrated = self._calibrate_rest(module, [layer for layer in self.found if layer.name not in configs])
        activations = calibrated.activations if calibrated else {}
        records = tuple(_record(layer, choices[layer.name], configs.get(layer.name), self.rest) for layer in self.found)
        manifest = Manifest(self.imported.inputs, self._outputs(module), layers=records)
        return _Rewritten(
            pipeline.quantize_rest(activations, self.imported.weight_scales)(module), manifest, calibrated
        )

    def _calibrate_rest(self, rewritten: tvm.IRModule, floats: Sequence[layers.Layer]) -> unbinarised.Calibrated | None:
        """The ranges of the layers that run in int8, None where there are none."""
        names = [layer.name for layer in floats if unbinarised.reason_for_float32(layer) is None]
        if self.rest == "float32" or not names:
            return None
        specs = self.imported.inputs, self._outputs(rewritten)
        return unbinarised.calibrate(rewritten, *specs, names, self.host, self.data, self.say)

    def _judge_rest(
        self, compiled: CompiledModel, module: tvm.IRModule, manifest: Manifest, calibrated: unbinarised.Calibrated
    ) -> CompiledModel:
        """Compares with the same network whose rest is float32; says so where the ranges are those of random inputs."""
        here = compiled if self.host == self.target else emit(module, self.host, manifest, self.say)
        result = agreement.compare(here.load(), calibrated.float_rest, self.data)
        cosine = "undefined" if result.cosine is None else f"{result.cosine:.4f}"
        if self.data is None and (guessed := len(calibrated.activations) - calibrated.own):
            warnings.warn(
                f"{guessed} layers run in int8 on the ranges of {result.inputs}: on these, top-1"
                f" agrees with a float32 rest on {result.agreement:.0%}, cosine of the outputs {cosine}; calibration"
                " data gives the ranges of real inputs",
                stacklevel=4,
            )
        source = calibrated.describe(result.inputs)
        found = {"calibration": source, "agreement": result.agreement, "cosine": result.cosine}
        return replace(compiled, report={**compiled.report, "rest": found})

    def _outputs(self, rewritten: tvm.IRModule) -> tuple[TensorSpec, ...]:
        names = [str(name) for name in rewritten.attrs[TAP_NAMES]] if TAP_NAMES in (rewritten.attrs or {}) else []
        results = fields_of(read_main(rewritten).result)[len(self.imported.outputs) :]
        tapped = (
            TensorSpec(name, tuple(int(e) for e in result.ty.shape), str(result.ty.dtype.dtype))
            for name, result in zip(names, results, strict=True)
        )
        return (*self.imported.outputs, *tapped)

    def _judge(
        self, compiled: CompiledModel, rewritten: tvm.IRModule, manifest: Manifest, untrained: Sequence[str]
    ) -> CompiledModel:
        """Compares with the model as it was given where layers were rewritten that were not trained for it.

        That model is float but for its own HORQ layers, which are what their training made of them.
        """
        if not untrained:
            return replace(compiled, report={**compiled.report, "agreement": None, "cosine": None})
        self.say("comparing with the float model")
        plain = Manifest(self.imported.inputs, self.imported.outputs)
        reference = emit(pipeline.rewrite(self.imported.trained)(self.canonical), self.host, plain, self.say)
        here = compiled if self.host == self.target else emit(rewritten, self.host, manifest, self.say)
        result = agreement.compare(here.load(), reference.load(), self.data)
        cosine = "undefined" if result.cosine is None else f"{result.cosine:.3f}"
        what, were = ("1 layer", "was") if len(untrained) == 1 else (f"{len(untrained)} layers", "were")
        warnings.warn(
            f"{what} {were} rewritten that {were} not trained for HORQ: on {result.inputs} top-1 agrees"
            f" with the float model on {result.agreement:.0%}, cosine of the outputs {cosine}; {TRAINING}",
            stacklevel=4,
        )
        return replace(compiled, report={**compiled.report, "agreement": result.agreement, "cosine": result.cosine})


def emit(
    rewritten: tvm.IRModule,
    target: targets.Target,
    manifest: Manifest,
    say: Progress,
    lookup: Lookup | None = None,
    form: Emit = "standalone",
) -> CompiledModel:
    """Optimises, lowers and links a rewritten module into a library in a temporary folder, kernels as `lookup` says."""
    say("scheduling kernels")
    lookup = lookup or Lookup(None, target)
    with target.tvm_target():
        grouped = pipeline.optimise(target)(rewritten)
        algorithms = pipeline.kernels(target)(grouped)
        lowered = pipeline.schedule(target, lookup.choose)(algorithms)
    _warn_of_stale(lookup.stale)
    of_layer = {layer: lookup.of(algorithms[kernel]) for kernel, layer in layers_of_kernels(grouped).items()}
    manifest = replace(manifest, layers=tuple(_scheduled(layer, of_layer) for layer in manifest.layers))
    say("compiling")
    folder = _Folder()
    library = folder.path / "model.so"
    steps = {kernel: f"{kernel} {layer}" for kernel, layer in layers_of_kernels(grouped).items()}
    if form == "standalone":
        return CompiledModel(library, standalone(lowered, target, manifest, library, steps).to_dict(), folder)
    written = virtual_machine(lowered, target, manifest, library, steps)
    uses = {"kernels": [{**asdict(use), "occupancy": use.occupancy} for use in written.uses]} if written.uses else {}
    return CompiledModel(library, {**written.manifest.to_dict(), **uses}, folder)


def layers_of_kernels(grouped: tvm.IRModule) -> dict[str, str]:
    """The layer of each kernel that has one, by the kernel's name. (FuseTIR keeps the one and drops the other.)"""
    return {
        gvar.name_hint: str(function.attrs[LAYER_ATTR])
        for gvar, function in grouped.functions.items()
        if LAYER_ATTR in (function.attrs or {})
    }


def _scheduled(layer: LayerRecord, of_layer: Mapping[str, tuple[bool, int]]) -> LayerRecord:
    """The record with what the database knows of the layer's kernel."""
    tuned, records = of_layer.get(layer.name, (False, 0))
    return replace(layer, schedule="tuned" if tuned else "default", records=records)


def _warn_of_stale(workloads: Sequence[str]) -> None:
    if workloads:
        warnings.warn(
            f"{len(workloads)} kernels of the tuning database were measured with other schedules than this horq-tvm has"
            f" ({', '.join(workloads[:3])}{', ...' if len(workloads) > 3 else ''}); they run by default: tune again",
            stacklevel=5,
        )


def _import(
    model: Any, example_inputs: tuple[Any, ...] | None, input_shapes: Mapping[str, tuple[int, ...]] | None
) -> ImportedModel:
    """Whatever the user has, as Relax."""
    if type(model).__module__.startswith("onnx.") or (isinstance(model, str | Path) and Path(model).suffix != ".pt2"):
        from .frontend.onnx import import_onnx

        return import_onnx(model, input_shapes)
    from .frontend.torch import import_torch

    return import_torch(model, example_inputs, input_shapes)


def _form(emit: Any, target: targets.Target) -> Emit:
    """Which library to make, its compiler being there. Raises UsageError or HorqError before anything takes time."""
    if emit is not None and emit not in EMITS:
        raise UsageError(f"emit: found {emit!r}; accepted: {', '.join(EMITS)}")
    if target.family != "cuda":
        return "standalone" if emit is None else EMITS[EMITS.index(emit)]
    if emit == "standalone":
        raise UsageError(f"emit: a standalone library cannot hold kernels for a card ({target.name}); accepted: tvm")
    toolkit.find().check(target.archs)
    return "tvm"


def _check_rest(rest: str, target: targets.Target) -> None:
    if rest not in RESTS:
        raise UsageError(f"rest: found {rest!r}; accepted: {', '.join(RESTS)}")
    if rest == "int8" and int8.style(target) is None:
        raise UsageError(
            f"rest: int8 has no kernels for the family {target.family!r} of {target.name}; accepted: float32"
        )


def _check_taps(taps: Sequence[str], choices: Mapping[str, layers.Choice]) -> None:
    """UsageError for a layer that there is not, or that has no planes, before anything takes time."""
    for name in taps:
        if name not in choices:
            raise UsageError(f"cannot tap {name!r}: there is no such layer; there are: {', '.join(choices) or 'none'}")
        if choices[name].config is None:
            able = ", ".join(other for other, choice in choices.items() if choice.config is not None) or "none"
            raise UsageError(
                f"cannot tap {name!r}: it stays float ({choices[name].reason}), so without planes; accepted: {able}"
            )


def _record(layer: layers.Layer, choice: layers.Choice, config: LayerConfig | None, rest: Rest) -> LayerRecord:
    """What became of a layer; where int8 was asked for and cannot be, the reason says that as well."""
    if config is None:
        against = unbinarised.reason_for_float32(layer) if rest == "int8" else None
        reason = choice.reason if against in (None, choice.reason) else f"{choice.reason}; {against}"
        return LayerRecord(layer.name, layer.op, reason=reason, rest="float32" if against else rest)
    return LayerRecord(layer.name, layer.op, config.order, config.scale)


def _warn_of_relus(names: Sequence[str]) -> None:
    if names:
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        warnings.warn(
            f"order 1 behind a ReLU carries no information, every sign is +1: {listed}; use order 2, or binarise the"
            f" output of batch normalisation ({TRAINING})",
            stacklevel=5,
        )


def _warn_of_nothing(choices: Mapping[str, layers.Choice], order: int | str | None) -> None:
    if order != "float" and all(choice.config is None for choice in choices.values()):
        reasons = sorted({choice.reason or "" for choice in choices.values()})
        why = "; ".join(reasons) or "the model has no conv or dense layer"
        warnings.warn(f"no layer was rewritten: {why}", stacklevel=3)
