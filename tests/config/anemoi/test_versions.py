"""The oldest supported versions of Anemoi, and the process that reads the data."""

import subprocess
from importlib.metadata import PackageNotFoundError

import pytest
import yaml

from anemoi_dist.config.anemoi import facts, versions
from anemoi_dist.config.anemoi.facts import Facts, describe
from anemoi_dist.errors import ConfigError, PreflightError


def test_the_installed_ones_are_supported():
    versions.check_versions()


@pytest.mark.parametrize("installed", ["0.10.0", "0.17.0", "0.9.8.dev3", "0.17.1rc1"])
def test_older_ones_are_refused(monkeypatch, installed):
    monkeypatch.setattr(versions, "version", lambda package: installed if package == "anemoi-training" else "9.9")
    if installed == "0.17.1rc1":  # as the release, for what is asked here
        versions.check_versions()
        return
    with pytest.raises(ConfigError, match=rf"anemoi-training {installed} is installed; 0\.17\.1 is the oldest"):
        versions.check_versions()


def test_newer_ones_pass(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: "1.0+local.4")
    versions.check_versions()


def test_none_is_refused(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(versions, "version", missing)
    with pytest.raises(ConfigError, match=r"requirements-anemoi\.txt"):
        versions.check_versions()


def answered(monkeypatch, stdout, *, code=0):
    asked = []

    def run(command, **options):
        asked.append((command, yaml.safe_load(options["input"])))
        return subprocess.CompletedProcess(command, code, stdout, "first\nlast line")

    monkeypatch.setattr(facts.subprocess, "run", run)
    return asked


def test_facts(monkeypatch, capsys):
    asked = answered(
        monkeypatch, 'a library prints\n{"num_samples": {"training": 84, "validation": 16}, "error": null}\n'
    )
    assert describe({"a": 1}, config="c", allowed=["mine"]) == Facts(84, 16)
    ((command, settings),) = asked
    assert (command[1:], settings) == (["-m", "anemoi_dist.tasks.anemoi.inspect", "mine"], {"a": 1})
    assert "reading the data" in capsys.readouterr().err


def test_an_error_about_the_data(monkeypatch):
    answered(monkeypatch, '{"num_samples": {}, "error": "FileNotFoundError: /data.zarr"}')
    with pytest.raises(ConfigError, match=r"/data\.zarr"):
        describe({}, config="c")


@pytest.mark.parametrize("stdout", ["", "nonsense", "[]", "{}"])
def test_no_answer(monkeypatch, stdout):
    answered(monkeypatch, stdout, code=1)
    with pytest.raises(PreflightError, match="last line"):
        describe({}, config="c")
