"""`RewriteLayers`: the chosen float layers become residual binarisation and a bitserial op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.specs import LayerConfig
from horq_tvm.straightline import Array, Program, Writer, array_of, constant, fields_of, op_name, read_main

TAP_NAMES = "horq.tap_names"
LAYER_OPS = ("horq.conv2d", "horq.dense")


def binary_weight(weight: Array) -> tuple[Array, Array]:
    """weight float32 [F, ...] → int8 sign(W) of the same shape, sign(0) = +1, and α float64 [F].

    α_f = mean|W_f| (Li et al. 2017, eq. 5) in float64, rounded once to float32 and held as float64.
    """
    signs = np.where(weight >= 0, 1, -1).astype("int8")
    alpha = np.abs(weight.astype("float64")).reshape(len(weight), -1).mean(axis=1)
    return signs, alpha.astype("float32").astype("float64")


@tvm.transform.module_pass(opt_level=0, name="RewriteLayers")
class RewriteLayers:
    """horq.conv2d and horq.dense of `configs` → (horq.scales →) horq.binarize → horq.bitserial_*.

    Layers that read the same value in the same way share scales and planes. A dense layer x[...,L] becomes a 1×1
    convolution over [N,1,M,L], N the first axis, so that `patch` means a row of the last axis and `sample` one image.
    For each layer of `taps`, main also returns its input, β, planes and output, the latter behind the α and bias that
    the layer's node has; the module attribute "horq.tap_names" lists their names in that order. Raises HorqError on a
    name of `configs` that is not in the module, UsageError on a layer that cannot be tapped and on `static` without as
    many betas as the order.
    """

    def __init__(self, configs: Mapping[str, LayerConfig], taps: Sequence[str] = ()) -> None:
        self.configs = dict(configs)
        self.taps = tuple(dict.fromkeys(taps))
        untapped = [name for name in self.taps if name not in self.configs]
        if untapped:
            raise UsageError(
                f"cannot tap {', '.join(untapped)}: not rewritten, so without planes; "
                f"layers that can be tapped: {', '.join(self.configs) or 'none'}"
            )

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        names = {str(value.attrs["name"]) for _, value in program.bindings if op_name(value) in LAYER_OPS}
        missing = sorted(self.configs.keys() - names)
        if missing:
            found = ", ".join(sorted(names)) or "none"
            raise HorqError(f"no layer {', '.join(missing)} to rewrite; layers in the module: {found}")
        with Writer(mod, program) as writer:
            rewriter = _Rewriter(writer)
            for var, value in program.bindings:
                config = self.configs.get(str(value.attrs["name"])) if op_name(value) in LAYER_OPS else None
                if config is None:
                    writer.bind(var, value)
                else:
                    writer.map(var, rewriter.layer(value, config))
                    name = str(value.attrs["name"])
                    if name in self.taps:
                        rewriter.parts[name]["output"] = _output(program, var, value)
            return self._finish(writer, program, rewriter)

    def _finish(self, writer: Writer, program: Program, rewriter: _Rewriter) -> tvm.IRModule:
        if not self.taps:
            return writer.finish(program.result)
        tapped = {f"tap.{name}.{part}": expr for name in self.taps for part, expr in rewriter.parts[name].items()}
        mod = writer.finish(relax.Tuple([*fields_of(program.result), *tapped.values()]))
        return mod.with_attr(TAP_NAMES, list(tapped))


class _Rewriter:
    """Emits layers, and remembers what later ones can share and what taps return."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.parts: dict[str, dict[str, relax.Expr]] = {}
        self._shared: dict[Any, relax.Expr] = {}

    def layer(self, value: relax.Call, config: LayerConfig) -> relax.Expr:
        """The rewritten layer's output, of the shape and type of `value`."""
        name = str(value.attrs["name"])
        x = self.writer.resolve(value.args[0])
        weight = array_of(value.args[1])
        if weight is None:
            raise HorqError(f"layer {name} has weights that are not constant: it cannot be binarised")
        dense = op_name(value) == "horq.dense"
        image = self._as_image(x) if dense else x
        geometry = ops.Geometry((1, 1)) if dense else ops.Geometry.of(value.attrs)
        beta = self._beta(image, name, config, geometry)
        planes = self._planes(image, beta, config, geometry)
        signs, alpha = binary_weight(weight.reshape(len(weight), 1, 1, -1) if dense else weight)
        operands = [planes, constant(signs), constant(alpha), constant(np.zeros_like(alpha)), beta]
        how: dict[str, Any] = {"name": name, "order": config.order, "scale": config.scale, "geometry": geometry}
        output = self.writer.emit(ops.bitserial(*operands, dense=dense, **how))
        if dense:
            output = self.writer.emit(relax.op.reshape(output, ops.shape_of(value)))
        self.parts[name] = {"input": x, "beta": beta, "planes": planes}
        return output

    def _share(self, key: Any, value: relax.Expr) -> relax.Expr:
        if key not in self._shared:
            self._shared[key] = self.writer.emit(value)
        return self._shared[key]

    def _as_image(self, x: relax.Expr) -> relax.Expr:
        """x [...,L] → [N,1,M,L]; of a vector [L], or rows [N,L], an image is one row."""
        shape = ops.shape_of(x)
        batch = shape[0] if len(shape) > 1 else 1
        rows = int(np.prod(shape[1:-1], dtype=int))
        return self._share((x, "image"), relax.op.reshape(x, (batch, 1, rows, shape[-1])))

    def _beta(self, x: relax.Expr, name: str, config: LayerConfig, geometry: ops.Geometry) -> relax.Expr:
        if config.scale != "static":
            window = _window(config, geometry, keep_groups=False)
            key = (x, "beta", config.order, config.scale, window)
            return self._share(key, ops.scales(x, order=config.order, scale=config.scale, geometry=window))
        betas = config.betas or ()
        if len(betas) != config.order or not np.all(np.isfinite(betas)):
            raise UsageError(
                f"layer {name}: static scale of order {config.order} needs {config.order} finite betas, found "
                f"{list(betas) or 'none'}; give them in the plan or calibrate"
            )
        return self._shared.setdefault((x, "betas", betas), constant(np.array([betas], "float32")))

    def _planes(self, x: relax.Expr, beta: relax.Expr, config: LayerConfig, geometry: ops.Geometry) -> relax.Expr:
        window = _window(config, geometry, keep_groups=True)
        how: dict[str, Any] = {"order": config.order, "scale": config.scale, "geometry": window}
        return self._share((x, beta, "planes", config.order, config.scale, window), ops.binarize(x, beta, **how))


def _output(program: Program, var: relax.Var, layer: relax.Call) -> relax.Var:
    """The value behind the affines that are the layer's own; a reshape may stand among them (a 1-D convolution)."""
    left = int(layer.attrs["affines"])
    while left:
        user = program.sole_user(var)
        if user is None:
            raise HorqError(f"layer {layer.attrs['name']}: found its product in use before its own {left} affines")
        var, left = user, left - (op_name(program.values[user]) in ("relax.add", "relax.multiply"))
    return var


def _window(config: LayerConfig, geometry: ops.Geometry, *, keep_groups: bool) -> ops.Geometry:
    """What scales and planes depend on: the whole geometry with `patch`, else at most the groups."""
    if config.scale == "patch":
        return geometry
    return ops.Geometry((1, 1), groups=geometry.groups if keep_groups else 1)
