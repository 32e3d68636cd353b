"""The command `jaxformer reproduce`."""

from jaxformer.commands.main import main

if __name__ == "__main__":
    main("reproduce")
