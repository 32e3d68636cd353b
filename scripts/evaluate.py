"""The command `jaxformer evaluate`."""

from jaxformer.commands.main import main

if __name__ == "__main__":
    main("evaluate")
