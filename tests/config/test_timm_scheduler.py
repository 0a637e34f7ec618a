import subprocess
import sys
import textwrap


def _python(code, cwd):
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_loads_without_models_and_torchvision(tmp_path):
    out = _python(
        """
        import sys
        sys.modules["torchvision"] = None  # as on a machine without it
        from anemoi_dist.config.timm_scheduler import load_timm_scheduler
        module = load_timm_scheduler()
        assert load_timm_scheduler() is module
        assert module.CosineLRScheduler.__module__ == "timm.scheduler.cosine_lr"
        assert not [name for name in sys.modules if name.split(".")[0] == "timm"]
        print("fine")
        """,
        tmp_path,
    )
    assert out == "fine\n"


def test_a_later_import_of_timm_is_the_real_one(tmp_path):
    package = tmp_path / "timm"
    (package / "scheduler").mkdir(parents=True)
    (package / "__init__.py").write_text("from . import models\nwhole = True\n")
    (package / "models.py").write_text("")
    (package / "scheduler" / "__init__.py").write_text("from timm.scheduler.cosine_lr import CosineLRScheduler\n")
    (package / "scheduler" / "cosine_lr.py").write_text("class CosineLRScheduler: pass\n")
    out = _python(
        """
        import sys
        sys.path.insert(0, ".")
        from anemoi_dist.config.timm_scheduler import load_timm_scheduler
        load_timm_scheduler()
        assert "timm.models" not in sys.modules
        import timm, timm.scheduler
        assert timm.whole and timm.scheduler.CosineLRScheduler
        load_timm_scheduler.cache_clear()
        assert load_timm_scheduler() is timm.scheduler
        print("fine")
        """,
        tmp_path,
    )
    assert out == "fine\n"
