import textwrap


def test_loads_without_models_and_torchvision(warm):
    script = """
        import sys
        sys.modules["torchvision"] = None  # as on a machine without it
        from anemoi_dist.config.timm_scheduler import load_timm_scheduler
        module = load_timm_scheduler()
        assert load_timm_scheduler() is module
        assert module.CosineLRScheduler.__module__ == "timm.scheduler.cosine_lr"
        assert not [name for name in sys.modules if name.split(".")[0] == "timm"]
        print("fine")
    """
    done = warm.run(textwrap.dedent(script))
    assert done.stdout == "fine\n", done.stderr


def test_a_later_import_of_timm_is_the_real_one(warm, tmp_path):
    package = tmp_path / "timm"
    (package / "scheduler").mkdir(parents=True)
    (package / "__init__.py").write_text("from . import models\nwhole = True\n")
    (package / "models.py").write_text("")
    (package / "scheduler" / "__init__.py").write_text("from timm.scheduler.cosine_lr import CosineLRScheduler\n")
    (package / "scheduler" / "cosine_lr.py").write_text("class CosineLRScheduler: pass\n")
    script = """
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
    """
    done = warm.run(textwrap.dedent(script), folder=tmp_path)
    assert done.stdout == "fine\n", done.stderr


def test_others_import_it_without_the_rest(warm):
    script = """
        import sys
        sys.modules["torchvision"] = None
        from anemoi_dist.config.timm_scheduler import enter_bare_timm
        enter_bare_timm()
        from timm.scheduler.scheduler import Scheduler
        print("fine")
    """
    done = warm.run(textwrap.dedent(script))
    assert done.stdout == "fine\n", done.stderr
