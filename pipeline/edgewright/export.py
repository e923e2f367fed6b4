"""The first stage: a PyTorch model becomes ONNX, or an ONNX file is let in; parity is proved.

Python that a recipe names ("file.py:function") is the user's own code and runs as such. An ONNX
file is not trusted: `admit` checks it and it only runs in a child process that can be stopped.
"""

import contextlib
import importlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import onnx

from edgewright import model as models
from edgewright.admit import TRIAL_SECONDS, admit, admit_bytes, strip_debug, trial
from edgewright.data import Feed, InputSpec, call_user, load_function, samples
from edgewright.errors import BadInput, EnvironmentMissing
from edgewright.external import shown
from edgewright.parity import Tally
from edgewright.recipe import Recipe
from edgewright.runtime.local import open_local
from edgewright.settings import suggestion
from edgewright.soundness import Note, note
from edgewright.stage import Job, Report

SAMPLES = 16
# What the dynamo exporter's operators are written for; per-channel QDQ needs 13 or later.
OPSET = 18
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".pkl", ".bin", ".safetensors", ".pt2", ".tar")


def run(job: Job) -> Report:
    """Write the model to `job.output_model()`; the report proves that it is the source's equal.

    Report: {"source", "notes", "parity", "model"}. Raises BadInput where source, recipe and
    calibration data do not fit together or parity fails, EnvironmentMissing without torch.
    """
    source = job.recipe.model.source
    job.tell("exporting", 0, 0)
    if ".py:" in source:
        report = from_torch(job)
    elif source.lower().endswith(".onnx"):
        report = from_onnx(job)
    elif source.lower().endswith(CHECKPOINTS):
        raise BadInput(
            f"model.source {source} is a checkpoint: weights without a network, and often a "
            "pickle, which is never loaded",
            expected='"model.onnx", or "file.py:function" that builds the network',
            hint="write a function that makes the module, calls load_state_dict("
            "torch.load(path, weights_only=True)) and returns (module, example inputs)",
        )
    else:
        raise BadInput(
            f"model.source {source}",
            expected='"model.onnx" or "file.py:function"',
            found="another kind of file",
        )
    return {**report, "model": models.summary(job.output_model())}


# --- ONNX -------------------------------------------------------------------------------------


def from_onnx(job: Job) -> Report:
    """Admit the file, and run calibration samples through it within time and memory limits."""
    source, out = job.recipe.model.source, job.output_model()
    admitted = admit(job.recipe.path(source), out)
    notes: list[Note] = admitted.pop("notes")
    model = models.load(out)
    specs = models.input_specs(model)
    check_recipe_inputs(job.recipe, specs)
    names = [o.name for o in model.graph.output]
    tallies = {name: Tally(name, source) for name in names}
    count = 0
    with trial(out, source, TRIAL_SECONDS) as infer:
        for count, feed in enumerate(calibration(job, specs), 1):
            for name, value in zip(names, infer(feed), strict=True):
                tallies[name].see(np.asarray(value), count - 1)
    notes += [note(text, "warning") for t in tallies.values() for text in t.warnings()]
    return {
        "source": {"kind": "onnx", "source": source, **admitted},
        "notes": notes,
        "parity": {
            "method": "the model is the source; its outputs on calibration samples hold no NaN",
            "samples": count,
            "outputs": [t.report() for t in tallies.values()],
        },
    }


def calibration(job: Job, specs: list[InputSpec]) -> Iterator[Feed]:
    """The first calibration samples, with progress."""
    for k, feed in enumerate(islice(samples(job.recipe, specs, SAMPLES), SAMPLES)):
        job.tell("proving parity", k, SAMPLES)
        yield feed


def check_recipe_inputs(recipe: Recipe, specs: list[InputSpec]) -> None:
    """[model.inputs] names inputs of the model and agrees with their shapes."""
    by_name = {spec.name: spec for spec in specs}
    for name, wanted in recipe.model.inputs.items():
        if name not in by_name:
            raise BadInput(
                f"[model.inputs.{name}] in the recipe names no input of the model",
                hint=suggestion(name, by_name),
            )
        have = by_name[name].shape
        found = str([("free" if d is None else d) for d in have])
        if len(wanted.shape) != len(have):
            raise BadInput(
                f"[model.inputs.{name}] shape in the recipe has {len(wanted.shape)} dimensions",
                expected=f"{len(have)}, as the model's input",
                found=f"model shape {found}",
            )
        for axis, (want, is_) in enumerate(zip(wanted.shape, have, strict=True)):
            if is_ is None or want == is_:
                continue
            fix = f"write {is_} there, or export the model with that dimension free"
            raise BadInput(
                f"[model.inputs.{name}] shape in the recipe: dimension {axis} is {want!r}",
                expected=f"{is_}, as the model fixes it",
                found=f"model shape {found}",
                hint=fix,
            )


# --- PyTorch ----------------------------------------------------------------------------------


def from_torch(job: Job) -> Report:
    """Build the user's module, export it, let the result in, and compare the two."""
    torch = import_torch()
    source, out = job.recipe.model.source, job.output_model()
    module, arguments, notes = build_module(job, torch)
    check_examples(job.recipe, arguments)
    names = input_names(job.recipe, list(arguments))
    first = torch_outputs(torch, module, arguments, source)
    outputs = output_names([name for name, _ in first], names)
    data = export_bytes(torch, module, arguments, names, outputs, job.recipe)
    try:
        admitted = admit_bytes(data, out, folder=job.folder, name=source)
    except BadInput as error:
        raise BadInput(f"the model exported from {source}: {error}") from None
    notes += admitted["notes"]
    specs = models.input_specs(models.load(out))
    check_kept_free(job.recipe, specs, source)
    parity, told = prove_parity(job, torch, module, dict(zip(arguments, names, strict=True)), specs)
    return {
        "source": {
            "kind": "torch",
            "source": source,
            "class": type(module).__name__,
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in module.parameters()),
            "opset": admitted["opset"],
            "ir_version": admitted["ir_version"],
        },
        "notes": notes + told,
        "parity": parity,
    }


def import_torch() -> Any:
    """The torch module; EnvironmentMissing where it is not installed."""
    for name in ("torch", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise EnvironmentMissing(
                f"exporting a PyTorch model needs {name}",
                found=" ".join(str(error).split())[:200],
                hint="pip install 'edgewright[torch]', or give an .onnx file as model.source",
            ) from None
    return sys.modules["torch"]


def build_module(job: Job, torch: Any) -> tuple[Any, dict[str, Any], list[Note]]:
    """What the user's function returns: module in evaluation mode, example input per argument."""
    source = job.recipe.model.source
    torch.manual_seed(0)
    built = call_user(load_function(job.recipe.path(source), "model.source"), source)
    expected = "(torch.nn.Module, example inputs as a tuple or a dict of tensors)"
    if not isinstance(built, tuple) or len(built) != 2:
        raise BadInput(f"{source} returned {type(built).__name__}", expected=expected)
    module, examples = built
    module = getattr(module, "_orig_mod", module)  # what torch.compile wrapped
    if not isinstance(module, torch.nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise BadInput(
            f"{source} returned {type(module).__name__} as the model", expected="a torch.nn.Module"
        )
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    if not isinstance(examples, tuple | list | Mapping) or not examples:
        raise BadInput(f"{source}: example inputs", expected=expected, found=shown(examples))
    arguments = named_arguments(module, examples, source)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise BadInput(
                f"{source}: example input '{name}'",
                expected="a tensor",
                found=type(value).__name__,
                hint="give such values a default in forward, or fix them in the function",
            )
    notes = []
    training = [name or "the model" for name, part in module.named_modules() if part.training]
    if training:
        names = ", ".join(training[:3]) + (", ..." if len(training) > 3 else "")
        notes.append(
            note(
                f"{len(training)} modules were in training mode ({names}), which changes dropout "
                "and batch normalisation; switched to eval()",
                "warning",
            )
        )
    module = module.cpu().eval()
    return module, {name: value.detach().cpu() for name, value in arguments.items()}, notes


def named_arguments(module: Any, examples: Any, source: str) -> dict[str, Any]:
    """Example inputs by the names of forward's parameters, in the order of forward."""
    parameters = inspect.signature(module.forward).parameters
    plain = [
        n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if isinstance(examples, Mapping):
        for name in examples:
            if name not in plain:
                raise BadInput(
                    f"{source}: example input '{name}' is no argument of forward",
                    hint=suggestion(str(name), plain),
                )
        return {name: examples[name] for name in plain if name in examples}
    if len(examples) > len(plain):
        raise BadInput(
            f"{source}: {len(examples)} example inputs",
            expected=f"at most {len(plain)}, the named arguments of forward "
            f"({', '.join(plain) or 'none'})",
            hint="name every input in the signature of forward; *args are not exported",
        )
    return dict(zip(plain, examples, strict=False))


def input_names(recipe: Recipe, arguments: list[str]) -> list[str]:
    """Names of the ONNX inputs: forward's own where the recipe knows them, else the recipe's."""
    wanted = list(recipe.model.inputs)
    unknown = [name for name in wanted if name not in arguments]
    if not unknown:
        return arguments
    if len(unknown) == len(wanted) == len(arguments):
        return wanted
    raise BadInput(
        f"[model.inputs.{unknown[0]}] in the recipe names no argument of forward",
        expected="the names of forward's arguments, or a new name for every one of them in order",
        hint=suggestion(unknown[0], arguments),
    )


def output_names(keys: list[str], inputs: list[str]) -> list[str]:
    """Names of the ONNX outputs: the keys of a dict that forward returns, else `output`,
    numbered where there are several."""
    if all(keys) and len({*keys, *inputs}) == len(keys) + len(inputs):
        return keys
    plain = ["output"] if len(keys) == 1 else [f"output_{k}" for k in range(len(keys))]
    return [f"{name}_" if name in inputs else name for name in plain]


def dimension_names(recipe: Recipe, name: str) -> dict[int, str]:
    """The free dimensions of an input by axis, as the recipe names them."""
    given = recipe.model.inputs.get(name)
    return {k: d for k, d in enumerate(given.shape) if isinstance(d, str)} if given else {}


def check_examples(recipe: Recipe, arguments: dict[str, Any]) -> None:
    """The example inputs have the ranks and fixed sizes that the recipe states."""
    sizes: dict[str, int] = {}
    for name, onnx_name in zip(arguments, input_names(recipe, list(arguments)), strict=True):
        given, have = recipe.model.inputs.get(onnx_name), list(arguments[name].shape)
        if given is None:
            continue
        fits = len(given.shape) == len(have) and all(
            isinstance(want, str) or want == size
            for want, size in zip(given.shape, have, strict=True)
        )
        if not fits:
            raise BadInput(
                f"example input '{name}' of {recipe.model.source}",
                expected=f"shape {list(given.shape)}, as [model.inputs.{onnx_name}] in the recipe",
                found=str(have),
            )
        for axis, dimension in dimension_names(recipe, onnx_name).items():
            if sizes.setdefault(dimension, have[axis]) != have[axis]:
                raise BadInput(
                    f"example input '{name}': dimension '{dimension}'",
                    expected=f"{sizes[dimension]}, as in another input",
                    found=str(have[axis]),
                )


def export_bytes(
    torch: Any,
    module: Any,
    arguments: dict[str, Any],
    names: list[str],
    outputs: list[str],
    recipe: Recipe,
) -> bytes:
    """The module as a serialised ONNX model, without traces of this machine."""
    source = recipe.model.source
    shapes = {
        argument: dimension_names(recipe, name)
        for argument, name in zip(arguments, names, strict=True)
    }
    with quiet():
        try:
            program = torch.onnx.export(
                module,
                kwargs=dict(arguments),
                input_names=names,
                output_names=outputs,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            model: onnx.ModelProto = program.model_proto
        except Exception as error:  # every layer of the exporter has its own kinds
            raise BadInput(
                f"torch.onnx cannot export {source}",
                found=root_cause(error),
                hint="mend the module's forward, or export it yourself and give the .onnx file",
            ) from error
    strip_debug(model)  # stack traces hold paths of this machine
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    if model.ByteSize() > models.MAX_BYTES:
        raise BadInput(
            f"the model exported from {source} is too large for one ONNX file",
            expected="at most 2 GiB",
            found=f"{model.ByteSize() / 2**30:.1f} GiB",
        )
    return model.SerializeToString(deterministic=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send the exporter's prints to standard error, and drop its warnings and log lines."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def root_cause(error: BaseException) -> str:
    """The innermost exception in words: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def check_kept_free(recipe: Recipe, specs: list[InputSpec], source: str) -> None:
    """Dimensions that the recipe leaves free are free in the exported model."""
    for spec in specs:
        for axis, dimension in dimension_names(recipe, spec.name).items():
            if spec.shape[axis] is not None:
                raise BadInput(
                    f"torch fixed dimension '{dimension}' of input '{spec.name}'",
                    expected="it free, as in the recipe",
                    found=str(spec.shape[axis]),
                    hint=f"give {source} example inputs of size 2 or more there, and use no "
                    "plain numbers for it in forward",
                )


def prove_parity(
    job: Job, torch: Any, module: Any, arguments: dict[str, str], specs: list[InputSpec]
) -> tuple[Report, list[Note]]:
    """Run both on calibration samples and compare every output.

    `arguments`: the ONNX input for each argument of forward. The exported graph runs as it is
    written: what the runtime then fuses is not the export's.
    """
    source = job.recipe.model.source
    session = open_local(job.output_model(), optimize=False)
    tallies = [Tally(name, source) for name in session.outputs]
    count = 0
    for count, feed in enumerate(calibration(job, specs), 1):
        given = {a: torch.from_numpy(np.array(feed[name])) for a, name in arguments.items()}
        expected = torch_outputs(torch, module, given, source)
        if len(expected) != len(tallies):
            raise BadInput(
                f"parity: outputs of {source}",
                expected=f"{len(expected)} tensors, as forward returns",
                found=f"{len(tallies)} in the exported model",
                hint="return a tensor, or a tuple or dict of tensors, from forward",
            )
        for tally, (_, reference), value in zip(tallies, expected, session.run(feed), strict=True):
            tally.compare(reference, value, count - 1)
    for tally in tallies:
        if tally.failure():
            raise BadInput(
                f"parity of {source} failed: output '{tally.name}' of the exported model "
                f"{tally.failure()} over {count} calibration samples",
                expected="torch's results",
                hint="look for randomness or dropout outside modules in forward, and for "
                "branches on values; or export the model yourself",
            )
    notes = [note(text, "warning") for t in tallies for text in t.warnings()]
    return {
        "method": "torch against the exported graph on calibration samples",
        "samples": count,
        "outputs": [t.report() for t in tallies],
    }, notes


def torch_outputs(
    torch: Any, module: Any, given: dict[str, Any], source: str
) -> list[tuple[str, np.ndarray]]:
    """What the module itself gives: its tensors in order, with their keys ("" where none)."""

    def forward() -> Any:
        with torch.no_grad():
            return module(**given)

    def flat(key: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
        if isinstance(value, torch.Tensor):
            yield key, value.numpy()
        elif isinstance(value, Mapping):
            for inner, item in value.items():
                yield from flat(str(inner), item)
        elif isinstance(value, tuple | list):
            for item in value:
                yield from flat("", item)
        elif value is not None:
            raise BadInput(
                f"{source}: forward returns {type(value).__name__}",
                expected="a tensor, or a tuple or dict of tensors",
            )

    return list(flat("", call_user(forward, source)))
