"""The command `jaxformer reproduce`."""

from jaxformer.commands import main

if __name__ == "__main__":
    main("reproduce")
