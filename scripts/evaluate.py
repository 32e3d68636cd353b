"""The command `jaxformer evaluate`."""

from jaxformer.commands import main

if __name__ == "__main__":
    main("evaluate")
