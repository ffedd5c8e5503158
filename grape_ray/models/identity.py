"""What changes when a model's weights do, without reading them."""

from __future__ import annotations

from pathlib import Path

from grape_ray.models.hugging_face import load_config

_WEIGHTS = (".safetensors", ".bin", ".json")


def model_identity(name: str) -> str:
    """Of a folder the names, sizes and times of its files; of a hub name the commit.

    Raises:
        ConfigError: no model there.
    """
    config, folder = load_config(name), Path(name).expanduser()
    if not folder.is_dir():
        return f"{name}@{getattr(config, '_commit_hash', None)}"
    files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS)
    marks = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{folder.resolve()}{marks}"
