"""Calibration inputs: read one sample at a time, checked, never all in memory.

Sources: an .npz archive (keys are input names, first axis counts samples; varying lengths as
`name__000`, `name__001`, ...), a folder of .npy/.png/.jpg/.wav files, or "file.py:function"
yielding feeds. A sample with one dimension less than the model input gets a batch axis of 1,
any other is fed as it is.
"""

import hashlib
import importlib.util
import lzma
import math
import re
import sys
import wave
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np

from edgewright.errors import BadInput, EdgewrightError
from edgewright.recipe import DataSettings, Recipe
from edgewright.settings import suggestion

Feed = dict[str, np.ndarray]
IMAGES = (".png", ".jpg", ".jpeg")
# What numpy and the decompressors raise on damaged, encrypted or truncated members.
DAMAGED = (
    ValueError,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


@dataclass(frozen=True)
class InputSpec:
    """A model input: dtype, and shape with None for a free dimension."""

    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...]


def samples(recipe: Recipe, inputs: list[InputSpec], limit: int = 0) -> Iterator[Feed]:
    """Yield checked calibration feeds, at most `limit` (0: all).

    Raises BadInput naming the sample's index and the input: wrong name, dtype, shape, NaN or
    Inf; also where there are no samples at all.
    """
    count = 0
    for k, raw in enumerate(raw_samples(recipe, inputs)):
        if limit and k >= limit:
            break
        yield check_feed(raw, inputs, k)
        count += 1
    if count == 0:
        raise BadInput(
            f"calibration data {recipe.data.calibration} holds no samples",
            expected="at least 1, better 32 to 128, real inputs",
            hint="check the source of the calibration data",
        )


def raw_samples(recipe: Recipe, inputs: list[InputSpec]) -> Iterator[dict[str, Any]]:
    """The samples of whatever source the recipe names, not yet checked."""
    source = recipe.data.calibration
    if ".py:" in source:
        function = load_function(recipe.path(source), "data.calibration")
        yield from function_samples(function, source)
        return
    path = recipe.path(source)
    if path.is_dir():
        yield from folder_samples(path, inputs, recipe.data)
    elif not path.exists():
        raise BadInput(
            f"calibration data not found: {path}",
            expected="an .npz file, a folder, or file.py:function",
            hint="check data.calibration in the recipe",
        )
    elif path.suffix == ".npz":
        yield from npz_samples(path, inputs)
    else:
        raise BadInput(
            f"calibration data {path}",
            expected="an .npz file, a folder, or file.py:function",
            found=f"a file ending in '{path.suffix}'",
        )


def check_feed(raw: dict[str, Any], inputs: list[InputSpec], k: int) -> Feed:
    """One sample as a feed: names, dtypes, ranks and sizes as the model wants, all finite."""
    if not isinstance(raw, dict):
        raise BadInput(
            f"calibration sample {k}", expected="a dict: input name -> array", found=repr(type(raw))
        )
    names = [spec.name for spec in inputs]
    for name in raw:
        if name not in names:
            raise BadInput(
                f"calibration sample {k} has '{name}', which is no input of the model",
                hint=suggestion(name, names),
            )
    feed = {}
    for spec in inputs:
        where = f"calibration sample {k}, input '{spec.name}'"
        if spec.name not in raw:
            raise BadInput(f"{where} is missing", expected="one array for every model input")
        value = np.asarray(raw[spec.name])
        if value.dtype.hasobject:
            raise BadInput(where, expected=str(spec.dtype), found="Python objects")
        if value.dtype != spec.dtype:
            if not np.can_cast(value.dtype, spec.dtype, "same_kind"):
                raise BadInput(where, expected=str(spec.dtype), found=str(value.dtype))
            value, given = value.astype(spec.dtype), value
            if value.dtype.kind in "iu" and not np.array_equal(value, given):
                raise BadInput(
                    where, expected=f"values that fit {spec.dtype}", found=f"larger {given.dtype}"
                )
        if value.ndim == len(spec.shape) - 1:
            value = value[None]
        fits = value.ndim == len(spec.shape) and all(
            want is None or want == have for want, have in zip(spec.shape, value.shape, strict=True)
        )
        if not fits:
            wanted = [("any" if d is None else d) for d in spec.shape]
            raise BadInput(where, expected=f"shape {wanted}", found=f"shape {list(value.shape)}")
        if value.size == 0:
            raise BadInput(where, expected="values", found="an empty array")
        if value.dtype.kind in "fc" and not np.isfinite(value).all():
            bad = "NaN" if np.isnan(value).any() else "Inf"
            raise BadInput(
                where,
                expected="finite numbers",
                found=bad,
                hint="remove or mend that sample; one such value would spoil the int8 ranges",
            )
        feed[spec.name] = value
    return feed


def npz_samples(path: Path, inputs: list[InputSpec]) -> Iterator[dict[str, Any]]:
    """Samples of an .npz archive, streamed: only the current one is in memory."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise BadInput(
            f"calibration data {path} cannot be read",
            expected="an .npz archive (numpy.savez)",
            found=str(error),
        ) from None
    with archive:
        keys = [n[: -len(".npy")] for n in archive.namelist() if n.endswith(".npy")]
        names = [spec.name for spec in inputs]
        parts = {
            n: sorted(
                (k for k in keys if re.fullmatch(re.escape(n) + r"__\d+", k)), key=part_number
            )
            for n in names
        }
        known = set(names) | {k for group in parts.values() for k in group}
        for key in keys:
            if key not in known:
                raise BadInput(
                    f"calibration data {path} has '{key}', which is no input of the model",
                    hint=suggestion(key, names),
                )
        streams: dict[str, Iterator[np.ndarray]] = {}
        lengths = {}
        for name in names:
            if parts[name]:
                streams[name] = (whole_member(archive, k, path) for k in parts[name])
                lengths[name] = len(parts[name])
            elif name in keys:
                lengths[name], streams[name] = stream_member(archive, name, path)
            else:
                raise BadInput(
                    f"calibration data {path} lacks input '{name}'",
                    expected="an array for each of: " + ", ".join(names),
                    found=", ".join(keys) or "nothing",
                )
        if len(set(lengths.values())) > 1:
            raise BadInput(
                f"calibration data {path}",
                expected="the same number of samples for every input",
                found=", ".join(f"{n}: {c}" for n, c in lengths.items()),
            )
        for _ in range(next(iter(lengths.values()), 0)):
            yield {name: next(stream) for name, stream in streams.items()}


def part_number(key: str) -> int:
    """The number at the end of `name__012`; 1000 comes after 999, whatever the digits."""
    return int(key.rpartition("__")[2])


def open_member(archive: zipfile.ZipFile, key: str, path: Path) -> IO[bytes]:
    """A member's stream; BadInput where it is encrypted or packed in a way Python cannot read."""
    try:
        return archive.open(key + ".npy")
    except DAMAGED as error:
        raise BadInput(f"array '{key}' in {path} cannot be read", found=str(error)) from None


def whole_member(archive: zipfile.ZipFile, key: str, path: Path) -> np.ndarray:
    """One small array of the archive."""
    try:
        with open_member(archive, key, path) as file:
            array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
            return array
    except DAMAGED as error:
        raise BadInput(f"array '{key}' in {path} cannot be read", found=str(error)) from None


def stream_member(
    archive: zipfile.ZipFile, key: str, path: Path
) -> tuple[int, Iterator[np.ndarray]]:
    """Number of samples of an array, and an iterator that reads them one by one."""
    with open_member(archive, key, path) as file:
        shape, fortran, dtype = read_header(file, key, path)
    if not shape:
        raise BadInput(
            f"array '{key}' in {path}",
            expected="samples along the first axis",
            found="a single number",
        )

    def rows() -> Iterator[np.ndarray]:
        if fortran:  # rows are not contiguous there
            yield from whole_member(archive, key, path)
            return
        with open_member(archive, key, path) as file:
            read_header(file, key, path)
            size = math.prod(shape[1:]) * dtype.itemsize
            for _ in range(shape[0]):
                try:
                    data = file.read(size)
                except DAMAGED as error:
                    raise BadInput(f"array '{key}' in {path}", found=str(error)) from None
                if len(data) != size:
                    raise BadInput(f"array '{key}' in {path} is truncated")
                yield np.frombuffer(data, dtype).reshape(shape[1:])

    return shape[0], rows()


def read_header(file: Any, key: str, path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype at the start of a .npy stream; objects (pickles) are refused."""
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
    except DAMAGED as error:
        raise BadInput(f"array '{key}' in {path} cannot be read", found=str(error)) from None
    if dtype.hasobject:
        raise BadInput(
            f"array '{key}' in {path}", expected="numbers", found="pickled Python objects"
        )
    return shape, fortran, dtype


def folder_samples(
    folder: Path, inputs: list[InputSpec], settings: DataSettings
) -> Iterator[dict[str, Any]]:
    """A sample per file, in the order of the names, for models with one input."""
    if len(inputs) != 1:
        raise BadInput(
            f"calibration folder {folder}",
            expected="a model with one input",
            found=f"{len(inputs)} inputs: " + ", ".join(i.name for i in inputs),
            hint="store the samples as .npz, or yield them from file.py:function",
        )
    spec = inputs[0]
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if suffix == ".npy":
            try:
                yield {spec.name: np.load(path, allow_pickle=False)}
            except DAMAGED as error:
                raise BadInput(f"{path} cannot be read", found=str(error)) from None
        elif suffix in IMAGES:
            yield {spec.name: picture(path, spec, settings)}
        elif suffix == ".wav":
            yield {spec.name: sound(path)}
        else:
            raise BadInput(
                f"calibration folder {folder}",
                expected="files .npy .png .jpg .jpeg .wav only",
                found=path.name,
                hint="move other files elsewhere; nothing is skipped silently",
            )


def picture(path: Path, spec: InputSpec, settings: DataSettings) -> np.ndarray:
    """A picture as the model wants it: channels first or last, resized, normalised."""
    from PIL import Image

    shape = spec.shape[1:] if len(spec.shape) == 4 else spec.shape
    first = len(shape) == 3 and shape[0] in (1, 3)
    if not first and not (len(shape) == 3 and shape[2] in (1, 3)):
        raise BadInput(
            f"input '{spec.name}' takes no pictures",
            expected="a shape with 1 or 3 channels, such as [1, 3, 224, 224]",
            found=str(list(spec.shape)),
        )
    channels = shape[0] if first else shape[2]
    height, width = shape[1:] if first else shape[:2]
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
        if height is not None and width is not None:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    except (*DAMAGED, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises them all
        raise BadInput(f"{path} is not a readable picture", found=str(error)) from None
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    if spec.dtype != np.uint8:
        mean, std = (np.asarray(v, np.float32) for v in (settings.mean, settings.std))
        pixels = ((pixels * np.float32(settings.scale) - mean) / std).astype(spec.dtype)
    return pixels.transpose(2, 0, 1) if first else pixels


def sound(path: Path) -> np.ndarray:
    """A 16-bit .wav as float32 in -1..1, channels averaged."""
    try:
        with wave.open(str(path)) as file:
            width, channels = file.getsampwidth(), file.getnchannels()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise BadInput(f"{path} is not a readable .wav file", found=str(error)) from None
    if width != 2:
        raise BadInput(f"{path}", expected="16-bit samples", found=f"{8 * width}-bit")
    samples = np.frombuffer(data, "<i2").reshape(-1, channels).astype(np.float32) / 32768
    mono: np.ndarray = samples.mean(axis=1).astype(np.float32)
    return mono


def function_samples(function: Callable[[], Any], source: str) -> Iterator[dict[str, Any]]:
    """Feeds of the user's own function; what it raises is told with the place."""
    feeds = call_user(function, source)
    try:
        iterator = iter(feeds)
    except TypeError:
        raise BadInput(
            source,
            expected="feeds, yielded or in a list: a dict input name -> array for each sample",
            found=type(feeds).__name__,
        ) from None
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise user_error(source, error) from error
        yield item


def load_module(path: Path, what: str) -> ModuleType:
    """The user's own Python file as a module; its folder stays importable for later imports."""
    if not path.is_file():
        raise BadInput(f"{what}: {path} not found", expected="a Python file", hint="check the path")
    spec = importlib.util.spec_from_file_location(f"edgewright_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it loads
    folder = str(path.parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise user_error(str(path), error) from error
    finally:
        sys.path.remove(folder)
    if folder not in sys.path:
        sys.path.append(folder)  # last: the user's files must not hide other modules
    return module


def load_function(reference: Path, what: str) -> Callable[..., Any]:
    """The function that "file.py:name" names."""
    file, _, name = str(reference).rpartition(":")
    function = getattr(load_module(Path(file), what), name, None)
    if not callable(function):
        raise BadInput(f"{what}: no function '{name}' in {file}")
    return function


def call_user(function: Callable[..., Any], source: str, *args: Any) -> Any:
    """Call the user's code; an exception becomes a message that names file and line."""
    try:
        return function(*args)
    except EdgewrightError:
        raise  # ours, from inside a callback: it already says what is wrong
    except Exception as error:
        raise user_error(source, error) from error


def user_error(source: str, error: Exception) -> EdgewrightError:
    """The message for an exception in the user's own code."""
    trace = error.__traceback__
    line = ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(Path(source.split(":")[0]).name):
            line = f" in line {trace.tb_lineno}"
        trace = trace.tb_next
    return BadInput(
        f"{source} raised{line}",
        found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        hint="mend that function; it is run as it stands",
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a folder, over its names and contents in order."""
    whole = hashlib.sha256()
    if path.is_dir():
        for item in sorted(p for p in path.rglob("*") if p.is_file()):
            whole.update(f"{item.relative_to(path)}\0{file_digest(item)}\n".encode())
    else:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()


def source_digest(recipe: Recipe, source: str) -> str:
    """Digest of a data or code source of the recipe: of "file.py:name", all .py files beside it.

    User code may read anything; what lies beside it is what a build can know of.
    """
    if ".py:" in source:
        file = recipe.path(source.rpartition(":")[0])
        if not file.is_file():
            raise BadInput(f"{file} not found", expected="a Python file", hint="check the recipe")
        parts = [source]
        for item in sorted(file.parent.iterdir()):
            if item.is_file() and item.suffix in (".py", ".npz", ".npy", ".safetensors", ".json"):
                parts.append(f"{item.name}:{file_digest(item)}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    path = recipe.path(source)
    if not path.exists():
        raise BadInput(f"{path} not found", hint="check the paths in the recipe")
    return file_digest(path)
