"""Conformance cases for Block AttnRes: known inputs, outputs and gradients that any implementation can be held to.

Command:  python -m attnres_jax.depth.conformance [--data=DIR] [--float32] [--tolerance=1e-12]

It runs this package's plain loop and its scan on every case and prints the worst relative error at every site. Exit
codes: 0 all pass, 1 something fails, 2 the cases cannot be read. In float64 it needs a device that has it: set
JAX_PLATFORMS=cpu where the accelerator has not.

Another implementation checks itself, whatever its framework, with NumPy arrays:

    from attnres_jax.depth.conformance import check, load
    for case in load():
        arrays = case.arrays          # block_size, eps, kinds, embedding, queries, ...: build the stack from these
        verdicts = check(case, {"readout": ..., "inputs": ..., "grad_queries": ...})
        assert all(verdict.passed for verdict in verdicts), [str(v) for v in verdicts if not v.passed]

The file format, version 1: one compressed .npz a case, float64 and little-endian, L sublayers, width D, [B, T] tokens.

    format_version, description     1, and what the case is for
    block_size                      sublayers in a block; 1 is Full AttnRes; the last block may be short
    eps                             added to the mean square of a source, inside the root
    largest_logit                   what the float32 tolerance grows with
    kinds          [L]              "tanh": y = tanh(h @ W + b); "linear": y = h @ W + b; no norm, no residual
    embedding      [B, T, D]        source 0
    queries        [L+1, D]         pseudo-queries: every sublayer in order, then the readout
    key_scales     [L+1, D]         RMSNorm gains of the keys
    W, b           [L, D, D] [L, D] the sublayers' parameters
    cotangent      [B, T, D]        loss = sum(readout * cotangent)
    num_sources    [L+1]            the sources of a site: embedding, completed blocks, partial sum if there is one
    inputs         [L, B, T, D]     expected: what each sublayer reads (h_l)
    weights        [L+1, N, B, T]   expected: depth weights, in the order of the sources; zero from num_sources on
    outputs        [L, B, T, D]     expected: what each sublayer returns (y_l)
    readout        [B, T, D]        expected: what the output head reads
    loss           []               expected
    grad_*         as *             expected: gradients of embedding, queries, key_scales, W, b

The expected values come from tests/conformance/generate.py: plain NumPy, gradients by hand, no code of this package.
"""

import argparse
import dataclasses
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnres_jax.depth import Segment, depth_scan, make_rule
from attnres_jax.errors import UserError

FORMAT_VERSION = 1
DATA = Path(__file__).parent / "conformance_data"  # inside the package: an installed copy has them too
TOLERANCES = {"float64": 1e-12, "float32": 5e-6}
"""Relative, of logits up to one; a rounding error of a logit grows with it, and so does the tolerance."""
PARAMETERS = ("embedding", "queries", "key_scales", "W", "b")
GIVEN = ("description", "block_size", "eps", "largest_logit", "kinds", "cotangent", "num_sources", *PARAMETERS)
GRADIENTS = tuple(f"grad_{name}" for name in PARAMETERS)
EXPECTED = ("inputs", "weights", "outputs", "readout", "loss", *GRADIENTS)
COLUMNS = tuple(name for name in EXPECTED if name != "readout")  # the readout is what the last site reads
WHOLE = "whole"


@dataclasses.dataclass(frozen=True)
class Case:
    """One file: its name, and its arrays by the names of the format."""

    name: str
    arrays: Mapping[str, np.ndarray]

    @property
    def num_sublayers(self) -> int:
        """L."""
        return len(self.arrays["kinds"])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far one quantity is from the expected one at one site."""

    case: str
    site: str
    """A sublayer's number, `readout`, or `whole` for the loss and the gradient of the embedding."""
    quantity: str
    error: float
    """The largest difference over the largest expected value; NaN if something is not a number."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        word = "pass" if self.passed else "FAIL"
        return f"{self.case}, site {self.site}: {self.quantity} {self.error:.1e} of {self.tolerance:.1e} {word}"


def load(directory: str | Path = DATA) -> list[Case]:
    """The cases of a directory, by name.

    Raises:
      UserError: if there are none, or one cannot be read.
    """
    paths = sorted(Path(directory).glob("*.npz"))
    if not paths:
        raise UserError(f"no conformance cases (*.npz) in {directory}; name a directory that has them with --data=DIR")
    return [_load(path) for path in paths]


def _load(path: Path) -> Case:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a conformance case: it is no .npz file of plain arrays") from error
    version = arrays.get("format_version")
    if version is None or version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this program reads version {FORMAT_VERSION}")
    missing = [name for name in (*GIVEN, *EXPECTED) if name not in arrays]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; write it again with tests/conformance/generate.py")
    return Case(path.stem, arrays)


def check(
    case: Case, results: Mapping[str, np.ndarray], *, dtype: str = "float64", tolerance: float | None = None
) -> list[Verdict]:
    """Holds an implementation's `results` to a case, site by site.

    Args:
      case: one of `load()`.
      results: arrays by the names of `EXPECTED`, in its shapes. `readout` and one more are the least; what an
        implementation does not have (a fused one has no weights) is left out, and then not judged.
      dtype: what was computed in, a key of `TOLERANCES`.
      tolerance: another than that of `dtype`; for logits of size z > 1 it is multiplied by z.

    Returns:
      A verdict for every quantity at every site.

    Raises:
      ValueError: if `results` has an unknown name, or too little to judge, or `dtype` no tolerance.
    """
    if dtype not in TOLERANCES and tolerance is None:
        raise ValueError(f"dtype={dtype!r} has no tolerance of its own: give one; known: {', '.join(TOLERANCES)}")
    unknown = sorted(set(results) - set(EXPECTED))
    if unknown:
        raise ValueError(f"unknown results {unknown}; the names are {list(EXPECTED)}")
    if "readout" not in results or len(results) < 2:
        raise ValueError(f"results have {sorted(results)}; `readout` and at least one more are needed")
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    tolerance *= max(1.0, float(case.arrays["largest_logit"]))
    verdicts = []
    for name in EXPECTED:
        if name not in results:
            continue
        found, expected = np.asarray(results[name], np.float64), case.arrays[name]
        whole = name in ("loss", "readout", "grad_embedding")
        if found.shape != expected.shape:
            verdicts.append(Verdict(case.name, WHOLE, f"{name}, shape {found.shape}", np.inf, tolerance))
            continue
        # A gradient is judged on the scale of all its sites: at some it is zero, or nearly.
        scale = np.abs(expected).max() if name in GRADIENTS else None
        for site in range(1 if whole else len(expected)):
            pair = (found, expected) if whole else (found[site], expected[site])
            error = float(np.abs(pair[0] - pair[1]).max() / ((scale or np.abs(pair[1]).max()) or 1.0))
            label = WHOLE if whole else str(site) if site < case.num_sublayers else "readout"
            if name == "readout":
                verdicts.append(Verdict(case.name, "readout", "inputs", error, tolerance))
            else:
                verdicts.append(Verdict(case.name, label, name, error, tolerance))
    return verdicts


def run(case: Case, form: str, dtype: str = "float64") -> dict[str, np.ndarray]:
    """What this package computes on a case, as results for `check`.

    Args:
      case: one of `load()`.
      form: `plain`, the rule's loop differentiated by JAX, or `scan`, with its hand-transposed bank and every block
        recomputed in the backward pass. The scan has no weights.
      dtype: float64 (inside `jax.enable_x64(True)`) or float32.
    """
    arrays = {name: jnp.asarray(case.arrays[name], dtype) for name in (*PARAMETERS, "cotangent")}
    rule = make_rule("block", int(case.arrays["block_size"]), float(case.arrays["eps"]))
    forward = {"plain": _plain, "scan": _scan}[form]

    def loss(parameters):
        embedding, queries, key_scales, w, b = parameters
        sites = rule.init_sites(case.num_sublayers, embedding.shape[-1])
        sites.query, sites.key_scale = nnx.Param(queries), nnx.Param(key_scales)
        results = forward(case, rule, sites, embedding, w, b)
        return jnp.sum(results["readout"] * arrays["cotangent"]), results

    differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, results), gradients = differentiate([arrays[name] for name in PARAMETERS])
    results = results | {"loss": value} | dict(zip(GRADIENTS, gradients, strict=True))
    return {name: np.asarray(value) for name, value in results.items()}


def _sublayer(is_tanh, w, b, h):
    z = jnp.matmul(h, w, precision="highest") + b
    return jnp.where(is_tanh, jnp.tanh(z), z)


def _plain(case, rule, sites, embedding, w, b):
    def sublayer(index, kind):
        return lambda h: _sublayer(kind == "tanh", w[index], b[index], h)

    plain = rule.plain(sites, embedding, [sublayer(i, kind) for i, kind in enumerate(case.arrays["kinds"])])
    most = max(len(weights) for weights in plain.weights)
    weights = [jnp.pad(own, [(0, most - len(own)), *[(0, 0)] * (own.ndim - 1)]) for own in plain.weights]
    return {
        "inputs": jnp.stack(plain.inputs[:-1]),
        "weights": jnp.stack(weights),
        "outputs": jnp.stack(plain.outputs),
        "readout": plain.inputs[-1],
    }


def _scan(case, rule, sites, embedding, w, b):
    def call(kind, parameters, h, context):
        y = _sublayer(parameters["is_tanh"] > 0, parameters["w"], parameters["b"], h)
        return y, {"inputs": h, "outputs": y}

    is_tanh = jnp.asarray(case.arrays["kinds"] == "tanh", w.dtype)
    stacks = {"sublayer": {"w": w, "b": b, "is_tanh": is_tanh}}
    stream, newest = rule.begin(sites, embedding)
    segments = _segments(case.num_sublayers, rule.block_size)
    *out, reports = depth_scan(rule, segments, call, stacks, sites, stream, newest, remat="full")
    results = {"readout": rule.readout(sites, *out)}
    for name in ("inputs", "outputs"):
        found = [jnp.stack([own[name] for own in report], 1) for report in reports]  # [blocks, sublayers of a block]
        results[name] = jnp.concatenate([x.reshape(-1, *embedding.shape) for x in found])
    return results


def _segments(num_sublayers: int, block_size: int) -> list[Segment]:
    slots = np.arange(num_sublayers)
    whole = num_sublayers - num_sublayers % block_size
    runs = [slots[:whole].reshape(-1, block_size), slots[whole:].reshape(1, -1)]
    return [Segment(("sublayer",) * run.shape[1], run) for run in runs if run.size]


def table(title: str, verdicts: Sequence[Verdict]) -> str:
    """One case's verdicts, a row a site: the errors, a dash for what is not judged, and `pass` or `FAIL`."""
    lines = [title, "  " + "".join(f"{name.replace('grad_', 'd '):>13}" for name in ("site", *COLUMNS))]
    labels = dict.fromkeys(verdict.site for verdict in verdicts)
    for label in sorted(labels, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else label)):
        own = [verdict for verdict in verdicts if verdict.site == label]
        errors = {verdict.quantity: f"{verdict.error:.1e}" for verdict in own}
        row = "".join(f"{errors.pop(name, '-'):>13}" for name in COLUMNS)
        word = "pass" if all(verdict.passed for verdict in own) else "FAIL"
        lines.append(f"  {label:>13}{row}  {word}" + "".join(f"  {name}" for name in errors))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every case in both forms and prints the tables; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m attnres_jax.depth.conformance",
        description="Holds Block AttnRes to NumPy cases with gradients by hand.",
    )
    parser.add_argument("--data", default=DATA, help="directory of the cases (default: those of the package)")
    parser.add_argument("--float32", action="store_true", help="compute in float32, at its tolerance")
    parser.add_argument("--tolerance", type=float, help=f"relative, for logits up to 1 (default: {TOLERANCES})")
    arguments = parser.parse_args(argv)
    dtype = "float32" if arguments.float32 else "float64"
    try:
        cases = load(arguments.data)
    except UserError as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    verdicts = []
    for case in cases:
        for form in ("plain", "scan"):
            with jax.enable_x64(dtype == "float64"):
                own = check(case, run(case, form, dtype), dtype=dtype, tolerance=arguments.tolerance)
            title = f"{case.name} ({case.arrays['description']}), {form}, {dtype}, tolerance {own[0].tolerance:.1e}"
            print(table(title, own) + "\n", flush=True)
            verdicts += own
    failed = [verdict for verdict in verdicts if not verdict.passed]
    print(f"{len(cases)} cases, {len(verdicts)} verdicts, {len(failed)} failed: {'FAIL' if failed else 'pass'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
