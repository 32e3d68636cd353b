"""The command `jaxformer predict`."""

from jaxformer.commands.main import main

if __name__ == "__main__":
    main("predict")
