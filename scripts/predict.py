"""The command `jaxformer predict`."""

from jaxformer.commands import main

if __name__ == "__main__":
    main("predict")
