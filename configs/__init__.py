"""Hydra configuration groups (YAML); the package exists so that installed copies can be found."""
