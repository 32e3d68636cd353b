"""The command `jaxformer train`."""

from jaxformer.commands.main import main

if __name__ == "__main__":
    main("train")
