"""jaxformer new."""


def new(path: str, preset: str = "quickstart", /) -> None:
    """Writes a preset to a file of your own, to be edited: jaxformer new my_config.py shakespeare_cpu.

    Args:
        path: The file, which must not exist yet.
        preset: One of the names that jaxformer presets lists; by default quickstart.
    """
    import difflib

    from jaxformer.config import presets
    from jaxformer.data.files import located, write
    from jaxformer.spec import InputError

    file, known = located(path), presets()
    if file.suffix != ".py":
        raise InputError(f"path={path!r} must end in .py, such as my_config.py")
    if preset not in known:
        close = difflib.get_close_matches(preset, known, n=1)
        raise InputError(
            f"preset {preset!r} must be one of {', '.join(known)}" + (f"; did you mean {close[0]}?" if close else "")
        )
    text = known[preset].read_text(encoding="utf-8")
    text = text.replace(f'directory="runs/{preset}"', f'directory="runs/{file.stem}"')
    if file.exists():
        raise InputError(f"{path} exists already; give another name, or remove it")
    write(file, text)
    print(f"{path} is written; train it with: jaxformer train {path}")
