"""From what the user typed to a checkpoint that is whole, safe to open and named by its content.

Everything is checked before a weight is loaded: the directory, the config, the tokenizer, every
byte range of the safetensors files, checksums where there are any, and NaNs. What is refused is
refused in one sentence that says how to mend it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from open_autoglm.errors import CheckpointError
from open_autoglm.files import digest_files, digest_of, directory_atomic
from open_autoglm.schemas import Checkpoint, FileDigest
from open_autoglm.weights import (
    PICKLE,
    PICKLE_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    convert_pickles,
    find_weights,
    main_dtype,
    read_headers,
    read_json,
    refuse_misfit,
    refuse_non_finite,
)

CHECKSUMS = "SHA256SUMS"

_TOKENIZERS = (  # any one of these sets is a tokenizer
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
)
_COMPANIONS = (  # with the weights, everything that determines what the model says
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_CHECKSUM_LINE = re.compile(r"([0-9a-fA-F]{64})(?: [ *](.+))?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_checkpoint(
    model_path: str,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    cache: Path | None = None,
) -> Checkpoint:
    """Resolve ``model_path``, a directory or a hub id, and validate what is there.

    With ``allow_pickle``, ``.bin`` weights are converted once into a safetensors copy in ``cache``
    (beside the checkpoint if None), and the copy is the checkpoint. ``Checkpoint.trust_remote_code``
    is true only if it was asked for *and* transformers does not know the model type itself.

    Raises CheckpointError.
    """
    directory = _resolve(model_path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    name = _name(directory.name if Path(model_path).expanduser().exists() else model_path)
    try:
        config = _read_config(directory)
        _check_tokenizer(directory)
        if not find_weights(directory, SAFETENSORS, SAFETENSORS_INDEX):
            directory = _safetensors_copy(directory, name, allow_pickle, cache)
        return _validate(directory, name, config, trust_remote_code)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise CheckpointError(
            f"{error.filename or directory} cannot be read ({reason}): check its permissions"
        ) from error


def load_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of the checkpoint ``path``. Raises CheckpointError if it is refused."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    # A config class checks types, and some do arithmetic and look-ups on whatever the file says.
    wrong_type = (StrictDataclassError, TypeError, ValueError)
    wrong_value = (ArithmeticError, AttributeError, ImportError, LookupError)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (*wrong_type, *wrong_value) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"transformers refuses {path / 'config.json'} ({reason}): correct that entry"
        ) from error


def build_on_meta(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model that a transformers config describes, with shapes but no numbers; under a second at any size.

    Raises CheckpointError if transformers cannot build it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # A model's constructor does arithmetic and look-ups on whatever the config says.
    wrong = (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except wrong as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise CheckpointError(
            f"transformers cannot build a causal language model of type {config.model_type!r} from this "
            f"config ({reason}): correct config.json, or pass a model such as glm, llama or qwen3"
        ) from error


def read_checksums(directory: Path) -> dict[str, str]:
    """SHA-256 by file name, from ``SHA256SUMS`` and ``<file>.sha256`` in ``directory``, if there are any.

    Raises CheckpointError if such a file is not in the format of ``sha256sum``.
    """
    sums: dict[str, str] = {}
    for path in sorted((*directory.glob(CHECKSUMS), *directory.glob("*.sha256"))):
        for line in path.read_text(errors="replace").splitlines():
            match = _CHECKSUM_LINE.fullmatch(line.strip())
            if match is None or (match[2] is None and path.name == CHECKSUMS):
                raise CheckpointError(
                    f"{path} is not a list of SHA-256 sums: write it with sha256sum or remove it"
                )
            sums[Path(match[2] or path.stem).as_posix()] = match[1].lower()
    return sums


def verify_checksums(directory: Path, files: Iterable[FileDigest]) -> None:
    """Raise CheckpointError if a file's digest is not the one the directory's checksum files state."""
    sums = read_checksums(directory)
    for file in files:
        if sums.get(file.path, file.sha256) != file.sha256:
            raise CheckpointError(
                f"{directory / file.path} does not match its SHA-256 checksum, so it was changed or damaged: "
                "fetch the file again"
            )


def _validate(directory: Path, name: str, stated: dict[str, Any], trust_remote_code: bool) -> Checkpoint:
    """Check what config.json, as ``stated``, and the safetensors files hold; the quick checks come first."""
    weights = find_weights(directory, SAFETENSORS, SAFETENSORS_INDEX)
    headers = read_headers(directory, weights)
    remote_code = _needs_remote_code(stated, directory, trust_remote_code)
    architecture = _architecture(stated, directory, remote_code)
    config = load_config(directory, trust_remote_code=remote_code)
    context_tokens, vocab_size = _limits(config, directory)
    if not remote_code:
        refuse_misfit(build_on_meta(config), headers)
    files = digest_files(directory, _parts(directory, weights, remote_code))
    verify_checksums(directory, files)
    for file, tensors in headers.items():
        refuse_non_finite(file, tensors)
    return Checkpoint(
        path=directory,
        name=name,
        model_type=stated["model_type"],
        architecture=architecture,
        files=files,
        digest=digest_of([(file.path, file.sha256) for file in files]),
        weight_bytes=sum(file.stat().st_size for file in weights),
        weight_dtype=main_dtype(headers.values()),
        context_tokens=context_tokens,
        vocab_size=vocab_size,
        trust_remote_code=remote_code,
    )


def _resolve(model_path: str, *, trust_remote_code: bool, allow_pickle: bool) -> Path:
    """The absolute directory, downloaded from the hub first if ``model_path`` is a hub id."""
    path = Path(model_path).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise CheckpointError(f"{path} is a file: pass the directory that holds config.json and the weights")
    if not _HUB_ID.fullmatch(model_path):
        raise CheckpointError(f"the directory {path} does not exist: check the path")
    return _download(model_path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)


def _download(hub_id: str, *, trust_remote_code: bool, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "tokenizer*", "merges.txt", "*.jinja"]
    patterns += ["*.py"] if trust_remote_code else []
    patterns += ["*.bin"] if allow_pickle else []
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HFValidationError, OSError) as error:  # the hub's HTTP errors are OSErrors
        offline = isinstance(error, LocalEntryNotFoundError)
        reason = "the hub is offline" if offline else next(iter(str(error).splitlines()), "").rstrip(".")
        raise CheckpointError(
            f"{hub_id} is not a directory here, and the model hub gave no model of that name ({reason}): "
            "check the path, or the hub id and the connection"
        ) from error


def _name(path_or_id: str) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", path_or_id.rstrip("/").rsplit("/", 1)[-1].lower())
    return name.strip("._-") or "model"


def _read_config(directory: Path) -> dict[str, Any]:
    if not any(directory.iterdir()):
        raise CheckpointError(
            f"{directory} is empty: pass the directory that holds config.json and the weights"
        )
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no config.json: pass the directory of a Hugging Face checkpoint"
        )
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f'{path} does not say its model_type: add it, for example "model_type": "glm"')
    return config


def _check_tokenizer(directory: Path) -> None:
    if not any(all((directory / file).is_file() for file in files) for files in _TOKENIZERS):
        raise CheckpointError(
            f"{directory} has no tokenizer: "
            "add tokenizer.json, or tokenizer.model, or vocab.json and merges.txt"
        )
    if (directory / "tokenizer.json").is_file():
        read_json(directory / "tokenizer.json")


def _needs_remote_code(config: dict[str, Any], directory: Path, trusted: bool) -> bool:
    """True if only the checkpoint's own Python code knows the model type, and the user trusts it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = config["model_type"]
    if model_type in CONFIG_MAPPING_NAMES:
        return False
    if "auto_map" not in config:
        raise CheckpointError(
            f"transformers {transformers.__version__} does not know the model_type {model_type!r} of "
            f"{directory / 'config.json'}: correct it, or install a transformers that does"
        )
    if not trusted:
        raise CheckpointError(
            f"{directory} brings its own Python code for the model_type {model_type!r}, which is not run "
            "unless you trust it: read it, then pass --trust-remote-code"
        )
    return True


def _architecture(config: dict[str, Any], directory: Path, remote_code: bool) -> str:
    """The model class. Raises CheckpointError unless it predicts the next token."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise CheckpointError(
            f"{directory} is already quantised ({method}): pass the checkpoint it was made from, "
            "because quality is measured against that"
        )
    stated = config.get("architectures") or []
    if remote_code:
        return str(stated[0]) if stated else config["model_type"]
    model_type = config["model_type"]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    is_encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
    if causal is None or is_encoder or (stated and causal not in stated):
        what = ", ".join(map(str, stated)) or f"model_type {model_type!r}"
        raise CheckpointError(
            f"{directory / 'config.json'} describes {what}, which does not generate text token by token: "
            f"pass a causal language model such as {'GlmForCausalLM' if is_encoder or not causal else causal}"
        )
    return str(causal)


def _limits(config: Any, directory: Path) -> tuple[int, int]:
    """Context length and vocabulary size, both in tokens."""
    limits = []
    for key in ("max_position_embeddings", "vocab_size"):
        value = getattr(config.get_text_config(), key, None)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{directory / 'config.json'} has no usable {key} ({value!r}): give it as a number of tokens"
            )
        limits.append(value)
    return limits[0], limits[1]


def _parts(directory: Path, weights: tuple[Path, ...], remote_code: bool) -> list[Path]:
    """The files that make the checkpoint what it is; a README or a .bin beside them changes nothing."""
    parts = [directory / name for name in _COMPANIONS if (directory / name).is_file()]
    if directory / SAFETENSORS not in weights:
        parts.append(directory / SAFETENSORS_INDEX)
    code = directory.glob("*.py") if remote_code else ()
    return [*parts, *weights, *code]


def _safetensors_copy(directory: Path, name: str, allow_pickle: bool, cache: Path | None) -> Path:
    """A copy of a pickle checkpoint with safetensors weights, made once per content."""
    pickles = find_weights(directory, PICKLE, PICKLE_INDEX)
    if not pickles:
        raise CheckpointError(
            f"{directory} holds no weights: it needs {SAFETENSORS}, or {SAFETENSORS_INDEX} and its shards"
        )
    if not allow_pickle:
        raise CheckpointError(
            f"{directory} holds only pickled weights ({pickles[0].name}), which can run code when opened: "
            "pass a safetensors checkpoint, or --allow-pickle to have the tensors converted"
        )
    files = digest_files(directory, pickles)
    verify_checksums(directory, files)
    companions = [directory / part for part in _COMPANIONS if (directory / part).is_file()]
    content = digest_of([(file.path, file.sha256) for file in (*files, *digest_files(directory, companions))])
    copy = (cache or directory.parent) / f"{name}-safetensors-{content[:12]}"
    if not copy.is_dir():
        with directory_atomic(copy) as output:
            convert_pickles(pickles, output)
            for file in (*companions, *directory.glob("*.py")):
                shutil.copyfile(file, output / file.name)
    return copy
