"""The command `jaxformer sample`."""

from jaxformer.commands.main import main

if __name__ == "__main__":
    main("sample")
