"""The command `jaxformer sample`."""

from jaxformer.commands import main

if __name__ == "__main__":
    main("sample")
