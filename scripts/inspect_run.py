"""The command `jaxformer inspect`."""

from jaxformer.commands import main

if __name__ == "__main__":
    main("inspect")
