"""Carrying wheels to a machine without a network: split, checked, joined, installed."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import wheels as carrying
from wheels import ABOUT, SUMS, Refused, main, pack, sha256, unpack

PART_BYTES = 700


def tiny_wheel(directory: Path, name: str, padding: int) -> Path:
    """A wheel with one module; ``padding`` bytes make it longer."""
    directory.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": f"ANSWER = {padding}\n#{'x' * padding}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    path = directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return path


@pytest.fixture
def fetched(tmp_path: Path) -> Path:
    """Two wheels, one of them longer than a part."""
    tiny_wheel(tmp_path / "fetched", "tiny_small", 0)
    return tiny_wheel(tmp_path / "fetched", "tiny_large", 1500).parent


@pytest.fixture
def carried(fetched: Path, tmp_path: Path) -> Path:
    pack(fetched, tmp_path / "carried", "gpu,dev", PART_BYTES)
    return tmp_path / "carried"


def parts_of(carried: Path, wheel: str) -> list[Path]:
    return sorted(path for path in carried.iterdir() if path.name.startswith(wheel))


def test_wheels_come_out_as_they_went_in(fetched: Path, carried: Path, tmp_path: Path) -> None:
    """Whatever was split; no file carried is larger than asked, and common tools can check the list."""
    assert len(parts_of(carried, "tiny_large")) > 2
    assert all(part.stat().st_size <= PART_BYTES for part in parts_of(carried, "tiny_large"))
    assert unpack(carried, tmp_path / "wheels") == "gpu,dev"
    out = {path.name: path.read_bytes() for path in (tmp_path / "wheels").iterdir()}
    assert out == {path.name: path.read_bytes() for path in fetched.iterdir()}
    listed = dict(line.split()[::-1] for line in (carried / SUMS).read_text().splitlines())
    assert listed == {path.name: sha256(path) for path in carried.iterdir() if path.name != SUMS}


def test_what_was_carried_can_be_installed(carried: Path, tmp_path: Path) -> None:
    """By pip itself, from the joined wheels alone."""
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    unpack(carried, wheels)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", wheels]
    subprocess.run([*command, "--target", target, "tiny_small", "tiny_large"], check=True)
    code = "import tiny_small, tiny_large; print(tiny_small.ANSWER, tiny_large.ANSWER)"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=target, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["0", "1500"]


def flip(part: Path) -> None:
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (flip, "is damaged"),
        (lambda part: part.write_bytes(part.read_bytes()[:-1]), "is damaged"),
        (Path.unlink, "is missing"),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_a_damaged_part_is_refused_by_name(
    damage: Callable[[Path], object], word: str, carried: Path, tmp_path: Path
) -> None:
    """Before any wheel is written, and all of them in one sentence."""
    first, *_, last = parts_of(carried, "tiny_large")
    damage(first)
    damage(last)
    with pytest.raises(Refused) as refused:
        unpack(carried, tmp_path / "wheels")
    assert str(refused.value) == f"{first.name} {word}; {last.name} {word}: bring them again"
    assert not (tmp_path / "wheels").exists()


def relist(carried: Path, **entries: object) -> None:
    """Change what the pack says of itself, and its checksum with it: not damage, but another's work."""
    path = carried / ABOUT
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    sums = (carried / SUMS).read_text().splitlines()
    lines = [line for line in sums if not line.endswith(ABOUT)] + [f"{sha256(path)}  {ABOUT}"]
    (carried / SUMS).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"python": "3.9"}, "the wheels are for Python 3.9 on "),
        ({"format_version": 99}, "is not as this version writes it"),
        ({"wheels": {"../outside.whl": []}}, "is not as this version writes it"),
        ({"wheels": {"a.whl": ["not-listed.whl"]}}, "is not as this version writes it"),
        ({"wheels": 3}, "is not as this version writes it"),
        ({"unknown": 1}, "is not as this version writes it"),
    ],
)
def test_a_pack_for_another_machine_or_of_another_make_is_refused(
    entries: dict[str, object], sentence: str, carried: Path, tmp_path: Path
) -> None:
    """Nothing is written, least of all outside of the directory."""
    relist(carried, **entries)
    with pytest.raises(Refused, match=sentence):
        unpack(carried, tmp_path / "wheels")
    assert not (tmp_path / "wheels").exists()


def test_a_damaged_list_is_refused(carried: Path, tmp_path: Path) -> None:
    """Half a line is no checksum, and a folder without the list is no pack."""
    (carried / SUMS).write_text((carried / SUMS).read_text()[:40])
    with pytest.raises(Refused, match=f"{SUMS} is damaged"):
        unpack(carried, tmp_path / "wheels")
    with pytest.raises(Refused, match="is no pack"):
        unpack(tmp_path / "fetched", tmp_path / "wheels")


def test_the_command_packs_unpacks_and_says_in_one_sentence_what_is_wrong(
    fetched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, or 2 with the sentence on stderr."""
    source, wheels = str(tmp_path / "carry"), str(tmp_path / "wheels")
    asked = ["pack", "--extras", "gpu", "--output", source, "--wheels", str(fetched)]
    assert main(asked) == 0
    assert main(["unpack", "--source", source, "--wheels", wheels]) == 0
    assert len(list(Path(wheels).iterdir())) == 2
    assert main(asked) == 2
    assert capsys.readouterr().err == f"error: {source} is not empty: choose a new directory\n"
    elsewhere = ["pack", "--extras", "gpu", "--output", str(tmp_path / "elsewhere")]
    assert main([*elsewhere, "--wheels", wheels, "--part-mib", "0"]) == 2
    assert capsys.readouterr().err == "error: --part-mib must be at least 1\n"
    assert main([*elsewhere, "--wheels", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no wheel\n"


def test_packing_needs_nothing_that_must_be_installed_first() -> None:
    """It makes the environment, so it cannot need one."""
    code = f"import sys; sys.path.insert(0, {str(Path(carrying.__file__).parent)!r}); import wheels"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
