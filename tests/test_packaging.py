"""Import mapping, laziness and what a wheel holds."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str, cwd: Path, *options: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


KERNELS = "import transformers.utils as u; print(u.is_kernels_available())"


@pytest.mark.parametrize("installed", [False, True])
def test_transformers_sees_the_real_kernels_package_or_none(installed, tmp_path):
    """From the root, `kernels/` must not pass for Hugging Face's `kernels`, whether that is installed or not."""
    import transformers.utils.import_utils as found

    site = tmp_path / "site"
    if installed:
        low = getattr(found, "KERNELS_MIN_VERSION", "0.18.2")
        (site / "kernels").mkdir(parents=True)
        (site / "kernels" / "__init__.py").write_text(f"__version__ = '{low}'\nREAL = True\n")
        (site / f"kernels-{low}.dist-info").mkdir()
        (site / f"kernels-{low}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: kernels\nVersion: {low}\n"
        )
        code = f"{KERNELS}; import kernels; print(kernels.REAL)"
        assert python(code, ROOT, PYTHONPATH=str(site)).splitlines() == ["True", "True"]
    else:
        assert python(KERNELS, ROOT) == python(KERNELS, tmp_path)
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "evals" / "__init__.py").exists()


def test_the_checkout_bridge():
    code = (
        "import steerlens.evals.world.tasks, steerlens.recipes, steerlens.kernels; print(steerlens.recipes.__path__[0])"
    )
    assert python(code, ROOT, "-P", PYTHONPATH=str(ROOT)) == str(ROOT / "recipes")


def test_importing_methods_loads_no_torch():
    code = "import sys, steerlens, steerlens.methods as m; m.names(); m.ZeroTuning(2.0); print('torch' in sys.modules)"
    assert python(code, ROOT) == "False"


def test_backends_know_no_method_and_methods_no_backend():
    for folder, banned in (("backends", "steerlens.methods"), ("methods", "steerlens.backends")):
        for file in (ROOT / "steerlens" / folder).glob("*.py"):
            assert banned not in file.read_text(), file


def test_public_names():
    import steerlens

    assert set(steerlens.__all__) == {
        "PerRow", "Recipe", "Record", "Spans", "Steering", "capture", "encode", "key_sentences", "load_recipe", "steer",
    }  # fmt: skip
    for name in steerlens.__all__:
        assert getattr(steerlens, name).__name__ == name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # From a copy: building in place leaves a build/ whose stale files the next wheel would hold.
    source, out = tmp_path_factory.mktemp("source") / "steerlens", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"steerlens"}
    for file in (
        "tiny/model.safetensors", "tiny/tokenizer.json", "tiny/chat_template.jinja", "recipes/pasta-tiny.yaml",
        "recipes/seka-tiny.safetensors", "recipes/documents-tiny.jsonl",
        "py.typed", "evals/world/tasks.py", "kernels/README.md", "cli/run.py", "backends/sdpa.py",
        "measures/retrieval.py",
    ):  # fmt: skip
        assert f"steerlens/{file}" in names, file
    tracked = {p.relative_to(ROOT / "steerlens").as_posix() for p in (ROOT / "steerlens").rglob("*.py")}
    assert {f"steerlens/{p}" for p in tracked} <= set(names)
    assert wheel.stat().st_size < 8 << 20


def test_wheel_runs_away_from_the_checkout(wheel, tmp_path):
    """Unpacked into an empty folder, as an install does, with the checkout out of sight."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import steerlens, steerlens.recipes, sys; from steerlens import load_recipe; r = load_recipe('pasta-tiny');"
        "print(steerlens.__file__, r.methods[0].name, steerlens.recipes.__path__[0])"
    )
    for folder in (tmp_path, ROOT):
        assert python(KERNELS, folder, PYTHONPATH=str(tmp_path)) == python(KERNELS, ROOT.parent)
    file, method, recipes = python(code, tmp_path, "-P", PYTHONPATH=str(tmp_path)).split()
    assert file.startswith(str(tmp_path)) and recipes.startswith(str(tmp_path)) and method == "pasta"
