"""The command `jaxformer inspect`."""

from jaxformer.commands.main import main

if __name__ == "__main__":
    main("inspect")
