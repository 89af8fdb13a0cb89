__version__ = "0.1.0"

_HOME = {
    "Clip": "media",
    "Event": "events",
    "SmoothFoleyPipeline": "pipeline",
    "mux": "media",
}  # Where the names that the package offers are defined


def __getattr__(name):
    "Import a name when it is first used: the libraries below `SmoothFoleyPipeline` take seconds"
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOME])
